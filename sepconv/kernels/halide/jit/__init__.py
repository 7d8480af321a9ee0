"""From a pipeline to a call: object code, its place on disk and in memory, threads, buffers, packed weights."""
