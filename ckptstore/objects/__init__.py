"""Backends: the only room that knows fsspec, files and buckets. Internal, but for `ckptstore.testing`."""
