"""torch.distributed.checkpoint on a ckptstore store: `dcp.save`, `dcp.async_save` and `dcp.load`, with any planner.

    dcp.save(state_dict, storage_writer=CkptstoreWriter("s3://bucket/ckpts", run="llama", step=100))
    dcp.load(state_dict, storage_reader=CkptstoreReader("s3://bucket/ckpts", run="llama"))

What is saved is an ordinary checkpoint: a tensor whose shards lie on many ranks is one tensor of its full shape.
docs/decisions/0016-dcp.md says how.
"""

from ckptstore.integrations._dcp_reader import CkptstoreReader
from ckptstore.integrations._dcp_writer import CkptstoreWriter

__all__ = ["CkptstoreReader", "CkptstoreWriter"]
