"""avstore.augment: one draw per clip, nothing from outside the box, the same result in any batch."""

import dataclasses

import numpy as np
import pytest
import torch

from avstore import augment
from avstore.augment import IMAGENET_MEAN, IMAGENET_STD, VideoAugment, centre_crop, resize
from avstore.errors import UsageError

PLAIN = VideoAugment(
    32, flip=0, brightness=0, contrast=0, saturation=0, hue=0, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)
)
FULL = VideoAugment(32, grey=0.2, blur=0.5, cutout=8)


def pictures(batch, time=3, height=64, width=80, seed=0):
    """Smooth random pictures, so that interpolation is not all there is."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.integers(0, 256, (batch * time, 3, 8, 10)).astype(np.float32))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return fine.reshape(batch, time, 3, height, width).permute(0, 1, 3, 4, 2).contiguous()


def boxes_of(frames, box=None):
    return np.tile(box or [0, 0, *frames.shape[2:4]], (len(frames), 1))


def run(config, frames, boxes=None, videos=None, **kw):
    u = config.draw(3, 1, np.arange(len(frames)) if videos is None else videos, 0)
    return config(frames, boxes_of(frames) if boxes is None else boxes, u, **kw)


def test_shape_dtype_and_normalisation():
    frames = torch.full((2, 4, 64, 80, 3), 255, dtype=torch.uint8)
    out = run(dataclasses.replace(FULL, brightness=0, contrast=0, cutout=0), frames)
    assert out.shape == (2, 3, 4, 32, 32) and out.dtype == torch.float32
    for channel in range(3):
        expected = (1 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.allclose(out[:, channel], torch.tensor(expected), atol=1e-3)
    assert run(FULL, frames, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_static_clip_stays_static():
    frames = pictures(12, 1).expand(12, 5, 64, 80, 3).contiguous()
    out = run(FULL, frames)
    assert torch.equal(out, out[:, :, :1].expand_as(out))
    assert len({out[i].numpy().tobytes() for i in range(12)}) == 12


def test_results_do_not_depend_on_the_batch():
    frames = pictures(9)
    together = run(FULL, frames)
    for i in (0, 4, 8):
        assert torch.equal(run(FULL, frames[i : i + 1], videos=np.array([i]))[0], together[i])
    order = np.array([5, 2, 7, 0])
    assert torch.equal(run(FULL, frames[order], videos=order), together[order])


def test_colours_by_groups_equal_clip_by_clip():
    # an accelerator takes many clips at once: the same numbers must come out of the grouped path
    clips = torch.rand(8, 3, 2, 16, 16)
    u = FULL.draw(0, 0, np.arange(8), 0)[:, 22:]
    config = dataclasses.replace(FULL, size=16)
    grouped = config._blur(config._colours(clips.clone(), u), u)
    alone = [config._blur(config._colours(clips[i : i + 1].clone(), u[i : i + 1]), u[i : i + 1]) for i in range(8)]
    assert torch.allclose(grouped, torch.cat(alone), atol=1e-5)
    assert (u[:, 7] < config.blur).any() and (u[:, 6] < config.grey).any()


def test_nothing_from_outside_the_box_shows():
    frames = torch.full((200, 1, 64, 80, 3), 255, dtype=torch.uint8)  # poison
    box = [6, 10, 50, 60]
    frames[:, :, 6:56, 10:70] = 40
    boxes = boxes_of(frames, box)
    u = PLAIN.draw(0, 0, np.arange(200), 0)
    crops = PLAIN.crops(boxes, u)
    assert (crops[:, 0] >= 6).all() and (crops[:, 1] >= 10).all()
    assert (crops[:, 0] + crops[:, 2] <= 56).all() and (crops[:, 1] + crops[:, 3] <= 70).all()
    assert torch.allclose(PLAIN(frames, boxes, u), torch.tensor(40.0), atol=1e-3)
    products = augment._resize_by_products(frames, crops, 32, np.zeros(200, bool))
    assert (products == 40).all()
    assert torch.allclose(
        centre_crop(frames, boxes, 32, mean=(0, 0, 0), std=(1 / 255,) * 3), torch.tensor(40.0), atol=1e-3
    )


def test_crops_have_the_areas_and_ratios_asked_for():
    boxes = np.tile([0, 0, 256, 352], (4000, 1))
    crops = FULL.crops(boxes, FULL.draw(0, 0, np.arange(4000), 0))
    share = crops[:, 2] * crops[:, 3] / (256 * 352)
    ratio = crops[:, 3] / crops[:, 2]
    assert 0.075 < share.min() < 0.1 and 0.9 < share.max() <= 1.0
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.36
    assert (
        abs(np.median(np.log(ratio[share < 0.5]))) < 0.03
    )  # large tall crops do not fit a wide box, and are drawn anew
    free = crops[:, 0] / np.maximum(256 - crops[:, 2], 1)
    assert abs(free.mean() - 0.5) < 0.03 and free.min() < 0.02 and free.max() > 0.98


def test_an_impossible_crop_falls_back_to_the_centre():
    strip = np.array([[0, 3, 8, 70]])  # no crop of ratio 4 / 3 covers most of this strip
    config = VideoAugment(32, area=(0.9, 1.0))
    assert config.crops(strip, config.draw(0, 0, np.arange(1), 0)).tolist() == [[0, 3 + (70 - 11) // 2, 8, 11]]
    dot = np.array([[5, 5, 1, 1]])
    assert config.crops(dot, config.draw(0, 0, np.arange(1), 0)).tolist() == [[5, 5, 1, 1]]


def test_a_random_crop_is_evaluation_s_at_any_place():
    box = np.tile([0, 2, 128, 170], (400, 1))  # UCF101's 320 x 240
    plain = dataclasses.replace(PLAIN, size=112, crop="random", area=(0.1, 0.2))  # the area counts for nothing
    crops = plain.crops(box, plain.draw(3, 1, np.arange(400), 0))  # as `run` draws
    assert (crops[:, 2:] == 112).all()
    assert crops[:, 0].min() == 0 and crops[:, 0].max() == 16
    assert crops[:, 1].min() == 2 and crops[:, 1].max() == 60 and len(set(crops[:, 1])) > 50
    frames = pictures(6, 1, 128, 176)
    out = run(plain, frames, box[:6])
    for i, (y, x) in enumerate(crops[:6, :2]):  # pixels are copied, not resized
        cut = frames[i, :, y : y + 112, x : x + 112].permute(3, 0, 1, 2).float()
        assert torch.allclose(out[i], cut, atol=1e-3)
    low = np.array([[3, 5, 40, 100]])  # 7/8 of 40
    assert plain.crops(low, plain.draw(0, 0, np.arange(1), 0))[0, 2:].tolist() == [35, 35]
    with pytest.raises(UsageError, match="did you mean random"):
        VideoAugment(crop="randon")


def test_flip_mirrors():
    frames = pictures(40)
    plain, mirrored = run(PLAIN, frames), run(dataclasses.replace(PLAIN, flip=1.0), frames)
    assert torch.equal(mirrored, plain.flip(-1))
    half = run(dataclasses.replace(PLAIN, flip=0.5), frames)
    flipped = sum(torch.equal(half[i], mirrored[i]) for i in range(40))
    assert 8 < flipped < 32 and all(
        torch.equal(half[i], plain[i]) or torch.equal(half[i], mirrored[i]) for i in range(40)
    )


@pytest.mark.parametrize("size", [16, 32, 50, 90])
def test_both_ways_to_resize_agree_to_a_grey_level(size):
    frames = pictures(6)
    crops = np.array(
        [[0, 0, 64, 80], [3, 5, 20, 70], [10, 10, 5, 5], [63, 79, 1, 1], [0, 40, 64, 40], [8, 8, size % 40 + 1, 9]]
    )
    flips = np.array([False, True, False, True, True, False])
    fast, products = resize(frames, crops, size, flips), augment._resize_by_products(frames, crops, size, flips)
    assert (fast.int() - products.int()).abs().max() <= 1
    assert (fast != products).float().mean() < 0.2


def test_resizing_against_pillow_by_hand():
    # 4 -> 2 pixels: support 2, weights of the triangle at distances 1.5 .5 .5 (1.5 cut off): 1/4, 3/4, 3/4, 1/4 of 2
    row = (
        torch.tensor([0, 80, 160, 240], dtype=torch.uint8)[None, None, None, :, None].expand(1, 1, 4, 4, 3).contiguous()
    )
    out = resize(row, np.array([[0, 0, 4, 4]]), 2)[0, 0, 0, 0].tolist()
    left = (0 * 0.75 + 80 * 0.75 + 160 * 0.25) / 1.75
    assert out == [round(left), round(240 - left)]


def test_centre_crop_is_exact_where_it_can_be():
    frames = pictures(2, 2, 128, 176)
    boxes = np.array([[0, 0, 128, 176], [0, 2, 128, 170]])  # 16:9 cut, and UCF101's 320x240
    out = centre_crop(frames, boxes, 112, mean=(0, 0, 0), std=(1 / 255,) * 3)
    for clip, x in ((0, 32), (1, 31)):
        expected = frames[clip, :, 8:120, x : x + 112].permute(3, 0, 1, 2).float()
        assert torch.allclose(out[clip], expected, atol=1e-3)
    assert centre_crop(frames, boxes, 56).shape == (2, 3, 2, 56, 56)
    # a 256-high picture gives the centre 224 of it
    big = pictures(1, 1, 256, 352)
    exact = centre_crop(big, boxes_of(big), 224, mean=(0, 0, 0), std=(1 / 255,) * 3)
    assert torch.allclose(exact[0], big[0, :, 16:240, 64:288].permute(3, 0, 1, 2).float(), atol=1e-3)


# Colour against other arithmetic


def test_colour_operations_by_hand():
    pixel = torch.tensor([0.2, 0.4, 0.9])[None, :, None, None, None].expand(1, 3, 1, 2, 2).clone()
    grey = 0.2989 * 0.2 + 0.587 * 0.4 + 0.114 * 0.9
    factor = torch.tensor([1.4])
    by_hand = {
        augment._brightness: [0.28, 0.56, 1.0],
        augment._saturation: [max(0, 1.4 * v - 0.4 * grey) if 1.4 * v - 0.4 * grey < 1 else 1 for v in (0.2, 0.4, 0.9)],
    }
    by_hand[augment._contrast] = by_hand[augment._saturation]  # the mean of equal pixels is each one's grey
    for operation, expected in by_hand.items():
        assert torch.allclose(operation(pixel.clone(), factor)[0, :, 0, 0, 0], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_against_colorsys(turn):
    import colorsys

    rng = np.random.default_rng(0)
    colours = np.concatenate([rng.random((80, 3)), [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0.3, 0.3, 0.8]]])
    expected = []
    for red, green, blue in colours:
        h, s, v = colorsys.rgb_to_hsv(red, green, blue)
        expected.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    clips = torch.from_numpy(colours.astype(np.float32)).T.reshape(1, 3, 1, 1, -1)
    got = augment._hue(clips, torch.tensor([turn], dtype=torch.float32))[0, :, 0, 0].T.numpy()
    assert np.abs(got - np.array(expected)).max() < 1e-5


def test_jitter_draws_its_ranges_and_orders():
    frames = torch.full((300, 1, 16, 16, 3), 100, dtype=torch.uint8)
    config = dataclasses.replace(PLAIN, size=4, brightness=0.4)
    levels = run(config, frames)[:, 0, 0, 0, 0]
    assert levels.min() < 64 and levels.max() > 136 and levels.min() >= 59.9 and levels.max() <= 140.1
    one = pictures(1).expand(300, 3, 64, 80, 3).contiguous()
    crop_free = dataclasses.replace(VideoAugment(32), area=(1.0, 1.0), flip=0.0)
    assert len({t.numpy().tobytes() for t in run(crop_free, one)}) == 300


def test_grey_blur_and_cutout():
    frames = pictures(30)
    base = dataclasses.replace(PLAIN)
    plain = run(base, frames)
    grey = run(dataclasses.replace(base, grey=1.0), frames)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    blurred = run(dataclasses.replace(base, blur=1.0), frames)
    assert (blurred - plain).abs().max() > 1
    rough, smooth = plain.diff(dim=-1).abs().mean((1, 2, 3, 4)), blurred.diff(dim=-1).abs().mean((1, 2, 3, 4))
    assert (smooth <= rough).all() and smooth.mean() < rough.mean()
    flat = run(dataclasses.replace(base, blur=1.0), torch.full_like(frames, 90))
    assert torch.allclose(flat, torch.tensor(90.0), atol=1e-3)  # weights sum to one, at the edges too
    assert torch.equal(run(dataclasses.replace(base, cutout=0), frames), plain)


def test_blur_has_a_tenth_of_the_picture_in_taps():
    """11 of 112 pixels, as CrissCross' crop // 20 * 2 + 1; of 32, 3."""
    for size, reach in ((112, 5), (32, 1), (10, 1)):
        point = torch.zeros(1, 1, size, size, 3, dtype=torch.uint8)
        point[:, :, size // 2, size // 2] = 255
        config = dataclasses.replace(PLAIN, size=size, area=(1.0, 1.0), ratio=(1.0, 1.0), blur=1.0,
                                     blur_sigma=(2.0, 2.0))  # fmt: skip
        lit = run(config, point)[0, 0, 0].nonzero()
        assert (lit.amax(0) - lit.amin(0)).tolist() == [2 * reach, 2 * reach]


def test_cutout_by_hand():
    """Its side 1 .. 8 halved and rounded down, its centre anywhere, the square cut at the border; inside, pixels times
    the mean of the first frame after normalisation."""
    frames = pictures(200)
    config = dataclasses.replace(PLAIN, cutout=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    plain, cut = run(dataclasses.replace(config, cutout=0), frames), run(config, frames)
    u = config.draw(3, 1, np.arange(200), 0)[:, 22:]  # what `run` draws, behind the crop's
    sides, borders = set(), 0
    for k in range(200):
        side, half = 1 + int(u[k, 11] * 8), (1 + int(u[k, 11] * 8)) // 2
        y, x = int(u[k, 9] * 32), int(u[k, 10] * 32)
        expected = plain[k].clone()
        square = expected[:, :, max(y - half, 0) : y + half, max(x - half, 0) : x + half]
        square *= plain[k, :, 0].mean()
        assert torch.allclose(cut[k], expected, atol=1e-6), k
        sides.add(side)
        borders += square.shape[2] != square.shape[3]
    assert sides == set(range(1, 9)) and borders > 5


def test_a_new_setting_leaves_the_other_draws_alone():
    frames = pictures(10)
    assert torch.equal(
        run(dataclasses.replace(FULL, grey=0.0, blur=0.0, cutout=0), frames), run(VideoAugment(32), frames)
    )


def test_sound_gain():
    gains = augment.sound_gain(np.array([0.0, 0.5, 1 - 2**-53]), 0.1)
    assert gains.dtype == np.float32 and np.allclose(gains, [0.9, 1.0, 1.1])
    with pytest.raises(UsageError):
        augment.sound_gain(gains, 2)


def test_misuse_is_refused():
    frames = pictures(2)
    with pytest.raises(UsageError, match="outside its frame"):
        run(FULL, frames, np.array([[0, 0, 64, 81], [0, 0, 64, 80]]))
    with pytest.raises(UsageError, match="1 boxes for 2 clips"):
        centre_crop(frames, [[0, 0, 64, 80]], 32)
    with pytest.raises(UsageError, match="uint8"):
        run(FULL, frames.float())
    with pytest.raises(UsageError, match="uniform numbers"):
        FULL(frames, boxes_of(frames), np.zeros((2, 3)))
    for wrong in (
        {"size": 0},
        {"area": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"hue": 0.6},
        {"flip": 1.5},
        {"cutout": 200},
    ):
        with pytest.raises(UsageError):
            VideoAugment(**wrong)


def test_empty_batch():
    frames = torch.zeros((0, 4, 64, 80, 3), dtype=torch.uint8)
    assert run(FULL, frames).shape == (0, 3, 4, 32, 32)
    assert centre_crop(frames, np.zeros((0, 4), int), 32).shape == (0, 3, 4, 32, 32)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    frames = pictures(40)
    for config in (PLAIN, VideoAugment(32)):
        difference = (run(config, frames.cuda()).cpu() - run(config, frames)).abs()
        level = 1 / 255 / min(config.std)
        assert (
            difference.mean() < level and difference.max() < 12 * level
        )  # a grey level, stretched by the colour jitter
    together = run(VideoAugment(32), frames.cuda())
    alone = run(VideoAugment(32), frames[7:8].cuda(), videos=np.array([7]))
    assert (together[7:8] - alone).abs().max() < 0.1


def test_masks_by_hand():
    rows = torch.ones(2, 20, 10)
    # widths: floor(u * (widest + 1)), widest = ceil(share * n) - 1: 0.2 of 20 rows -> 0..3, 0.3 of 10 bins -> 0..2
    u = np.array([[0.99, 0.0, 0.5, 0.999, 0.99, 0.0, 0.0, 0.5], [0.0] * 8])
    out = augment.mask_bands(rows, u, time=0.2, freq=0.3)
    blank_rows = (out[0] == 0).all(1).nonzero()[:, 0].tolist()
    blank_bins = (out[0] == 0).all(0).nonzero()[:, 0].tolist()
    assert blank_rows == [0, 1, 2, 18, 19] and blank_bins == [0, 1]
    assert (out[1] == 1).all() and (rows == 1).all()
    assert augment.mask_bands(rows, u) is rows


def test_masks_keep_their_widths_and_reach_every_place():
    u = np.random.default_rng(0).random((1500, 8))
    out = augment.mask_bands(torch.ones(1500, 200, 80), u, time=0.1, freq=0.125)
    time, freq = (out == 0).all(2), (out == 0).all(1)
    assert int(time.sum(1).max()) == 2 * 19 and int(freq.sum(1).max()) == 2 * 9  # fewer than 20 rows, than 10 bins
    assert time.any(0).all() and freq.any(0).all()
    assert float(time.float().mean()) == pytest.approx(1 - (1 - 9.5 / 200) ** 2, rel=0.05)
    assert ((out == 0) == (time[:, :, None] | freq[:, None, :])).all()
    alone = augment.mask_bands(torch.ones(1, 200, 80), u[7:8], 0.1, 0.125)
    assert torch.equal(alone[0], out[7])


@pytest.mark.parametrize(("time", "freq", "shape"), [(1.5, 0, 8), (0, -0.1, 8), (0.1, 0.1, 7)])
def test_masks_that_cannot_be(time, freq, shape):
    with pytest.raises(UsageError):
        augment.mask_bands(torch.ones(3, 4, 5), np.zeros((3, shape)), time, freq)


def resized_by_torch(rows, top, left, height, width):
    """Pad, cut and resize one spectrogram (M, F) by torch's own bicubic, corner on corner as BYOL-A's code does."""
    m, f = rows.shape
    side = (int(1.5 * f) - f) // 2
    canvas = torch.zeros(m, int(1.5 * f))
    canvas[:, side : side + f] = rows
    cut = canvas[top : top + height, left : left + width]
    return torch.nn.functional.interpolate(cut[None, None], (m, f), mode="bicubic", align_corners=True)[0, 0]


def test_crops_of_a_spectrogram_are_torchs_bicubic_of_the_padded_one():
    rows = torch.randn(60, 40, 16, generator=torch.Generator().manual_seed(0))
    u = np.random.default_rng(0).random((60, augment.CROP_NUMBERS))
    out = augment.crop_rows(rows, u, (0.6, 1.5))
    assert out.shape == rows.shape and out.dtype == rows.dtype
    sizes = set()
    for k in range(60):
        width, height = int((0.6 + 0.9 * u[k, 0]) * 40), min(int((0.6 + 0.9 * u[k, 1]) * 16), 16)
        left, top = int(u[k, 2] * (60 - width + 1)), int(u[k, 3] * (16 - height + 1))
        sizes.add((width, height))
        expected = resized_by_torch(rows[k].T, top, left, height, width).T
        assert torch.allclose(out[k], expected, atol=1e-4), (k, width, height, left, top)
    assert min(w for w, _ in sizes) == 24 and max(w for w, _ in sizes) > 56 and {h for _, h in sizes} >= {9, 16}


def test_crops_by_hand():
    rows = torch.arange(8.0).reshape(1, 8, 1).expand(1, 8, 4).contiguous()
    same = augment.crop_rows(rows, np.array([[0.0, 0.0, 0.5, 0.0]]), (1.0, 1.0))  # 8 of 12: places 0..4, the middle
    assert torch.equal(same, rows)
    early = augment.crop_rows(rows, np.array([[0.0, 0.0, 0.0, 0.0]]), (1.0, 1.0))
    assert early[0, :, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]  # two rows of the canvas, then its first six
    late = augment.crop_rows(rows, np.array([[0.0, 0.0, 0.999, 0.0]]), (1.0, 1.0))
    assert late[0, :, 0].tolist() == [2, 3, 4, 5, 6, 7, 0, 0]
    # the corners of the crop are those of the result
    ends = augment.crop_rows(rows, np.array([[0.0, 0.0, 0.5, 0.0]]), (0.5, 0.5))  # 4 of 12: places 0..8, the middle
    assert ends[0, [0, -1], 0].tolist() == [2, 5]
    # a constant stays one within the spectrogram: the weights of a point sum to 1
    half = augment.crop_rows(torch.ones(1, 8, 4), np.array([[0.0, 0.0, 0.5, 0.9]]), (0.5, 0.5))
    assert torch.allclose(half, torch.ones(1, 8, 4), atol=1e-6)


def test_crops_do_not_depend_on_the_batch():
    rows = torch.randn(9, 20, 8, generator=torch.Generator().manual_seed(1))
    u = np.random.default_rng(1).random((9, 4))
    together = augment.crop_rows(rows, u)
    assert all(torch.equal(augment.crop_rows(rows[k : k + 1], u[k : k + 1])[0], together[k]) for k in range(9))
    assert augment.crop_rows(rows[:0], u[:0]).shape == (0, 20, 8)
    assert not torch.equal(together, rows)


@pytest.mark.parametrize(("scale", "shape"), [((0.0, 1.0), 4), ((1.5, 0.6), 4), ((0.6, 1.5), 3)])
def test_crops_that_cannot_be(scale, shape):
    with pytest.raises(UsageError):
        augment.crop_rows(torch.ones(3, 4, 5), np.zeros((3, shape)), scale)
