"""The operations as functions of tensors."""

from fastsae.ops.decode import DecodeGradients, decode_backward
from fastsae.ops.select import select_topk

__all__ = ["DecodeGradients", "decode_backward", "select_topk"]
