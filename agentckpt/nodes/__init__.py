"""The one encoding: deterministic CBOR, nodes ``[type, strong, weak, body]``, append-only Merkle lists.

Formats: ``store/FORMAT.md`` sections 2 and 4.
"""

from .cbor import MAX_DEPTH, ListSlot, decode, encode
from .lists import FAN_OUT, Item, MerkleList
from .node import MAX_NODE_BYTES, Node, check_ref, decode_node, encode_node, get_node, put_node, ref_kind

__all__ = [
    "FAN_OUT",
    "MAX_DEPTH",
    "MAX_NODE_BYTES",
    "Item",
    "ListSlot",
    "MerkleList",
    "Node",
    "check_ref",
    "decode",
    "decode_node",
    "encode",
    "encode_node",
    "get_node",
    "put_node",
    "ref_kind",
]
