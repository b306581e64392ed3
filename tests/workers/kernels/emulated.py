"""The AMX kernels over tiles in plain C++: the code around the tiles, on a processor without them."""

from workers.kernels.variants import AMX, AVX512_BF16, Variant

AMX_EMULATED = Variant(
    "amx_emulated",
    (*(flag for flag in AMX.flags if not flag.startswith("-mamx")), "-DHEADWATER_AMX_EMULATED"),
    AVX512_BF16.needs,
)
