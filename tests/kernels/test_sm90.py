"""Kernels of the running side compile for Hopper, on a machine that has none: the interpreter accepts programs that the compiler refuses."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime.engine.kernels.gpu import activation, adapters_triton, argmax, inputs, linear4_triton, linear8, linear16, norm, quantized_rows, sample

def check(kernel, constants, num_warps, **pointers):
    types = {name: "constexpr" if name in constants else pointers.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compile(ASTSource(fn=kernel, signature=types, constexprs=values), target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})

longs = ["source_ptr", "target_ptr", "slots_ptr", "positions_ptr", "drawn_ptr", "last_token_ptr", "ids_ptr", "logits_at_ptr", "ring_ptr"]
wide = {name: "*i64" for name in longs}
for sorts in (True, False):
    check(sample._draw_kernel, {"SORTS": sorts, "BLOCK": 8192}, 16, logits_ptr="*bf16", **wide)
check(inputs._blocks_kernel, {"BLOCK": 256}, 4)
check(inputs._rows_kernel, {"BLOCK_TOKENS": 16, "BLOCK": 256}, 4, **wide)
check(inputs._commit_kernel, {"BLOCK": 256}, 4, **wide)
halves = {name: "*bf16" for name in ("logits_ptr", "x_ptr", "weight_ptr", "bias_ptr", "out_ptr")}
check(argmax._largest_kernel, {"PARTS": 64, "BLOCK": 2048, "PDL": True}, 8, partials_ptr="*fp32", **halves, **wide)
for kind, split, early in ((0, True, True), (1, False, False)):
    constants = {"KIND": kind, "HAS_BIAS": False, "SPLIT": split, "EVEN_N": True, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "EARLY": early,
                 "PDL": True, "PRECISION": "tf32"}
    check(linear16._linear16_kernel, constants, 4, partials_ptr="*fp32", **halves)
for codes, largest in (("*i8", 127.0), ("*fp8e4nv", 448.0)):
    types = {"scale_ptr": "*fp32", "codes_ptr": codes, "gate_up_ptr": "*bf16", "residual_ptr": "*bf16", **halves}
    row = {"LARGEST": largest, "PDL": True}
    check(quantized_rows._quantize_kernel, {"BLOCK": 4096, **row}, 8, **types)
    check(activation._act_mul_quantized_kernel, {"KIND": 1, "BLOCK": 16384, **row}, 16, **types)
    check(norm._norm_kernel, {"ADD": True, "PLUS_ONE": False, "BLOCK": 4096, **row}, 8, **{**types, "out_ptr": codes}, eps="fp32")
    constants = {"HAS_BIAS": False, "EVEN_N": True, "EVEN_K": True, "WIDEN": False, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "PDL": True}
    pointers = {"x_ptr": codes, "weight_ptr": codes, "x_scale_ptr": "*fp32", "partials_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    for kind, split in ((0, True), (1, False)):
        check(linear8._linear8_kernel, {**constants, "KIND": kind, "SPLIT": split}, 4, scale_ptr="*fp32", **pointers)
tables = {"places_ptr": "*i64", "hidden_ptr": "*fp32", "memory_ptr": "*bf16", "y_ptr": "*bf16", **halves}
for block_t, block_n, slices in ((16, 64, 3), (16, 128, 1), (64, 128, 2)):
    constants = {"BLOCK_T": block_t, "BLOCK_R": 16, "PDL": True, "PRECISION": "tf32"}
    each = 1 if block_t == 16 else slices
    check(adapters_triton.shrink_kernel, {**constants, "SLICES": slices, "EACH": each, "EVEN_K": slices > 1, "BLOCK_K": 128}, 4, **tables)
    expand = {**constants, "SPLITS": 4, "BLOCK_N": block_n}
    check(adapters_triton.expand_kernel, {**expand, "SLICES": slices}, 4, **tables)
    check(adapters_triton.gated_expand_kernel, {**expand, "SLICES": min(slices, 2), "KIND": 1}, 8, **tables)
for codebook, scales, scale in (("nf4", 2, "*fp32"), ("q4_0", 4, "*fp16"), ("iq4_nl", 4, "*fp16")):
    types = {"words_ptr": "*i32", "absmax_ptr": scale, "codes_ptr": scale, "partials_ptr": "*fp32", **halves}
    asm = {"ASM": linear4_triton.lookup_asm(codebook, torch.bfloat16), "SCALES": scales}
    check(linear4_triton.dequantize_kernel, {**asm, "WIDE": False, "BLOCK_N": 64}, 4, **types)
    for block_m, block_n, sums in ((16, 64, True), (64, 128, True), (128, 128, False)):
        constants = {**asm, "HAS_BIAS": True, "SPLIT": block_m == 16, "SCALE_SUMS": sums, "EVEN_N": True, "PADDED": False, "PDL": True}
        constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "PRECISION": "tf32"}
        check(linear4_triton.linear4_kernel, constants, 8 if block_m == 64 else 4, **types)
print("compiled")
"""


def test_sm90_kernels_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
