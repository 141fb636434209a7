"""A checkpoint store for people who train models: incremental, verified, shared saves to a bucket or a disk.

    run = ckptstore.Store("s3://bucket/ckpts").run("lstm")
    run.restore({"model": model, "optimizer": optimizer})
    run.save({"model": model, "optimizer": optimizer, "step": step}, step=step)
"""

from ckptstore._version import __version__
