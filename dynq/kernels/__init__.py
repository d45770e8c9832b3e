"""The compiled kernels, one file a family. They take checked, C-contiguous arrays: call them through dynq.codec."""
