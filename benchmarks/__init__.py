"""What is measured: speed (loader, ingest, query), quality (retrieval, ...), and the set that `make demo` makes."""
