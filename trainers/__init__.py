"""Pre-training methods, one readable file each, and the plumbing they share. Importing this package imports nothing.

A method is an `nn.Module` that the loop (`loop.py`, `trainer.py`) drives through this contract, and nothing else:

    class Method(nn.Module):
        needs: Needs                      what clip it is fed (`needs.py`); the loop compares it with the store
        config: Config                    frozen dataclass of its own file; the paper's values are the defaults

        __init__(config, n_rows)          nets, heads, bank of `n_rows` videos: a pure function of (config, n_rows)
        forward(batch) == step(batch)     so that DistributedDataParallel sees the pass
        step(batch) -> (loss, metrics)    loss of this rank, already scaled: world * local sum / global count. Metrics
                                          are detached and scaled alike: their mean over ranks is the global value.
                                          Writes no bank; in train mode it keeps the embeddings for `after_step`
        after_step() -> dict              the explicit bank update from all steps since the last call, collective:
                                          call it on every rank after the optimiser's step
        start_epoch(epoch) -> dict        CMA's mining when due, collective; stats to log. Harmless when repeated
                                          for an epoch already begun (resume: load_method_state first)
        method_state() -> dict            name -> plain tensor (bank, Z, positives, counters), for safetensors; beside
                                          `state_dict()`, which holds weights and batch statistics only
        load_method_state(state)          the reverse; ConflictError where rows or widths differ
        own_rates() -> dict               where it has one: beginnings of parameter names -> constant learning rates
        embed(video=None, audio=None)     {'video', 'audio'}: unit length; {'video-trunk', 'audio-trunk'}: pooled
                                          features. The caller says `.eval()` and `no_grad`

A `Batch` (`batch.py`) carries tensors on the method's device with the clips' identity: row, position, draw, masks.

Files:

    encoders.py     R(2+1)D and Conv2D of the AVID family, their four maps
    heads.py        projection heads
    towers.py       two encoders with their heads, built from a seed
    bank.py         the memory bank (N, 2, D), its update, the partition constant
    draws.py        counter-based random bits
    negatives.py    draws of negatives: uniform, hard, mixed
    positives.py    CMA positives, exact and certified
    distributed.py  sums, gathers and means over ranks
    stateless.py    what a method without state answers to this contract
    backbones.py    every encoder by name; convert.py: published checkpoints
    methods.py      the table of methods; config.py, typed.py, settings.py: what a run is told, and shows
    teacher.py      frozen networks and given vectors to learn from
    spread.py       the collapse monitor
    avid.py         AVID: Self, Cross, Joint
    avid_cma.py     AVID-CMA; and every other method, one file each: `avstore train --list`

No method imports another: two files that need one formula each print it, as their papers do, and a test holds them
equal. What is plumbing is written once.
"""
