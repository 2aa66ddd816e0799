"""Builds a runnable model from a checkpoint in two stages: a Blueprint, drawn up without touching memory, and the
model itself over ranges that hold the weights.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.model_key import Quantization
from runtime.checkpoint.adapter_layout import AdapterTarget
from runtime.checkpoint.meta_model import build_skeleton, stored_specs, tied_names, untie
from runtime.checkpoint.model_config import ModelConfig, check_sizes, read_card
from runtime.checkpoint.name_mapping import resolve
from runtime.checkpoint.packed import Layout4Bit, PackedTensors
from runtime.checkpoint.packed_adapter import ChannelsOf, adapter_targets, all_channels
from runtime.checkpoint.quantized_shapes import SCALE_NAMES
from runtime.checkpoint.safetensors_index import StoredTensor, read_index, read_metadata
from runtime.checkpoint.weight_layout import Join, Placed, TensorSpec, WeightLayout, lay_out
from runtime.engine.adapters.bank import AdapterBank
from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.weight_readiness import WeightReadiness
from runtime.engine.model.build.bind import bind
from runtime.engine.model.build.equivalence_check import EquivalenceChecker, Verdict
from runtime.engine.model.build.fuse import NoMatchError, match_stack
from runtime.engine.model.build.sharding import TensorCuts, cut_tensors
from runtime.engine.model.build.weight_loader import WeightFiller
from runtime.engine.model.cpu.onednn_layout import OneDnnLayout, OneDnnMatrix
from runtime.engine.model.run.adapters import StepPort
from runtime.engine.model.run.attention import IMPLEMENTATION
from runtime.engine.model.run.collectives import Collectives
from runtime.engine.model.run.fused_spec import HeadPart, StackSpec
from runtime.engine.model.run.fused_stack import FusedStack
from runtime.engine.model.run.kv_geometry import AttentionGeometry, attention_geometry, kv_planes
from runtime.engine.model.run.rope import fix_frequencies, rotary_tables
from runtime.engine.model.run.step import BuiltModel, CausalForward
from runtime.engine.model.run.unfused import UnfusedForward
from runtime.engine.parallel.shard import WHOLE, Shard, shard_config
from runtime.errors import LoadFailed
from runtime.types import Checkpoint, ModelFacts

_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Blueprint:
    """The plan of a loaded model: everything except its memory.

    Attributes:
        spec: describes the fused stack. None if the module's own code runs.
        ordered: layouts of the matrices in oneDNN's order, by name.
        identity: equal for two loads whose weight images hold the same bytes.
        targets: the linear layers that adapters may change, as adapters number them.
    """

    card: ModelConfig
    skeleton: nn.Module
    spec: StackSpec | None
    path: str
    shape: AttentionGeometry
    layout: WeightLayout
    filler: WeightFiller
    ordered: Mapping[str, OneDnnMatrix]
    quantization: Quantization
    num_parameters: int
    identity: str
    targets: tuple[AdapterTarget, ...]
    head: HeadPart | None = None


def draw(
    model_id: str,
    checkpoint: Checkpoint,
    max_model_len: int | None,
    prover: EquivalenceChecker,
    *,
    num_threads: int,
    min_group_bytes: int,
    layout_4bit: Layout4Bit = "bitsandbytes",
    host_order: OneDnnLayout | None = None,
    shard: Shard = WHOLE,
) -> Blueprint:
    """Read configuration and headers, and decide how the model runs and where its tensors go.

    `layout_4bit` is the layout in which the device reads 4-bit codes: "bitsandbytes" on a CPU, "kernel" on a GPU.
    `host_order` is the layout of matrices on a CPU. `shard` is this rank of a tensor-parallel group. Raises LoadFailed with the model and the cause.
    """
    card = read_card(model_id, checkpoint, max_model_len)
    try:
        return _draw(card, checkpoint, prover, num_threads, min_group_bytes, layout_4bit, host_order, shard)
    except LoadFailed as error:
        error.model = model_id
        raise
    except Exception as error:
        detail = f"{card.architecture} cannot be built: {type(error).__name__}: {error}"
        raise LoadFailed(detail, model=model_id) from error


def _draw(
    card: ModelConfig,
    checkpoint: Checkpoint,
    prover: EquivalenceChecker,
    num_threads: int,
    min_group_bytes: int,
    layout_4bit: Layout4Bit,
    host_order: OneDnnLayout | None,
    shard: Shard,
) -> Blueprint:
    files = (checkpoint.packed_file,) if checkpoint.packed_file is not None else checkpoint.weight_files
    if not files:
        raise LoadFailed(f"no weight files found in {checkpoint.model_dir}")
    index = read_index(files)
    check_sizes(card, len(index))

    verdict = prover.verdict(card.model_class, card.config)
    if verdict.refused:
        raise LoadFailed(f"{card.architecture} is not supported: {verdict.reason}")
    skeleton = source = _skeleton(card, card.config, index)
    aliases = tied_names(skeleton)
    specs = stored_specs(skeleton, card.dtype, card.num_layers)
    num_parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
    if checkpoint.packed_file is not None:
        stored = PackedTensors(specs, index, read_metadata(checkpoint.packed_file), layout_4bit)
        specs, resolution = stored.specs, stored.resolve(aliases)
    else:
        resolution = resolve(skeleton, specs, index, aliases)

    channels_of: ChannelsOf = all_channels
    head: HeadPart | None = None
    if shard.size > 1:
        quantised = {name.rpartition(".")[0] for name in index if name.rpartition(".")[2] in SCALE_NAMES}
        skeleton = _skeleton(card, shard_config(card.config, shard), index)
        cuts = _cuts(source, skeleton, verdict, shard)
        specs, resolution = cut_tensors(specs, resolution, cuts, quantised)
        channels_of = cuts.channels
        if "lm_head" not in quantised:
            num_tokens = source.get_parameter("lm_head.weight").shape[0]
            head = HeadPart(*shard.slice_of(num_tokens), num_tokens)
    spec, joins, reason = _choose(skeleton, specs, verdict)
    layout = lay_out(specs, joins, card.num_layers, min_group_bytes)
    ordered = _in_order(host_order, layout, _products(skeleton, spec, layout)) if host_order is not None else {}
    return Blueprint(
        card=card,
        skeleton=skeleton,
        spec=spec,
        path=f"fused: {card.num_layers} layers" if spec else f"unfused: {reason}",
        shape=attention_geometry(skeleton),
        layout=layout,
        filler=WeightFiller(layout, resolution, source, num_threads, ordered),
        ordered=ordered,
        quantization=checkpoint.quantization,
        num_parameters=num_parameters,
        identity=_identity(layout, files, shard),
        targets=adapter_targets(source, spec.linears() if spec else (), channels_of),
        head=head,
    )


def assemble(
    blueprint: Blueprint,
    weights: Tensor,
    kv_memory: Tensor,
    kv: KvGeometry,
    kv_dtype: torch.dtype,
    arrival: WeightReadiness,
    ranks: Collectives | None = None,
    bank: AdapterBank | None = None,
) -> BuiltModel:
    """Return a runnable model over `weights` and `kv_memory`, without reading either.

    Both are uint8 on the engine's device, at addresses that do not change. `ranks` joins what the ranks of a tensor-parallel group compute.
    `bank`: the model's adapters; None = it takes none.
    """
    targets = () if bank is None else bank.targets
    card = blueprint.card
    device = weights.device
    placed = (*blueprint.layout.tensors, *blueprint.layout.joined)
    views = image_views(weights, placed)
    for tensor in placed:
        if matrix := blueprint.ordered.get(tensor.name):
            views[tensor.name] = matrix.over(weights[tensor.offset : tensor.offset + tensor.size_bytes])
    forward: CausalForward
    if blueprint.spec is not None:
        aliases = tied_names(blueprint.skeleton)
        views |= {alias: views[owner] for alias, owner in aliases.items()}
        tables = rotary_tables(blueprint.skeleton.get_submodule(blueprint.spec.rotary), device)
        forward = FusedStack(
            blueprint.spec,
            views,
            tables,
            blueprint.quantization,
            arrival,
            blueprint.layout.layer_groups,
            ranks,
            targets,
            blueprint.head,
        )
    else:
        port = StepPort()
        bind(blueprint.skeleton, views, blueprint.quantization, port, targets)
        forward = UnfusedForward(blueprint.skeleton, arrival, len(blueprint.layout.group_ends) - 1, port)
    return BuiltModel(
        forward=forward,
        planes=kv_planes(kv_memory, kv, blueprint.shape, kv_dtype),
        block_tokens=kv.block_tokens,
        vocab_size=card.vocab_size,
        # Block tables have a column per block of the longest sequence, and no sequence can have more blocks than exist.
        max_model_len=min(card.max_model_len, kv.max_slabs * kv.blocks_per_slab * kv.block_tokens),
        device=device,
        dtype=card.dtype,
        kv_dtype=kv_dtype,
        eos_token_ids=card.eos_token_ids,
        path=blueprint.path,
        token_stride=blueprint.shape.token_stride,
        adapters=None if bank is None else bank.table,
    )


def facts_of(blueprint: Blueprint, kv: KvGeometry) -> ModelFacts:
    """Return the facts of the model that the runtime reports."""
    card = blueprint.card
    return ModelFacts(
        model_id=card.model_id,
        architecture=card.architecture,
        path=blueprint.path,
        dtype=str(card.dtype).removeprefix("torch."),
        quantization=blueprint.quantization,
        weight_bytes=blueprint.layout.size_bytes,
        kv_bytes_per_token=kv.bytes_per_token,
        max_model_len=card.max_model_len,
        vocab_size=card.vocab_size,
        num_parameters=blueprint.num_parameters,
        eos_token_ids=card.eos_token_ids,
    )


def image_views(image: Tensor, placed: Sequence[Placed]) -> dict[str, Tensor]:
    """Return views of an image's tensors, by name."""
    return {
        tensor.name: image[tensor.offset : tensor.offset + tensor.size_bytes].view(tensor.dtype).view(tensor.shape)
        for tensor in placed
    }


def _skeleton(card: ModelConfig, config: Any, index: Mapping[str, StoredTensor]) -> nn.Module:
    """Build the model without its weights. Tied tensors that the files hold with different values are untied."""
    skeleton = build_skeleton(card.model_class, config, IMPLEMENTATION)
    fix_frequencies(skeleton, card.max_model_len)
    for alias, owner in tied_names(skeleton).items():
        if alias in index and owner in index and _differ(index[alias], index[owner]):
            untie(skeleton, alias)
    return skeleton


def _cuts(full: Any, local: Any, verdict: Verdict, shard: Shard) -> TensorCuts:
    """Return how the tensors of `full` are cut for the rank whose skeleton is `local`. Raises LoadFailed for a model that has no fused form."""
    if not verdict.fused:
        raise LoadFailed(
            f"it cannot be divided among {shard.size} devices, because its own code runs: {verdict.reason}"
        )
    try:
        whole, part = match_stack(full, verdict.interleaved), match_stack(local, verdict.interleaved)
    except NoMatchError as error:
        raise LoadFailed(f"it cannot be divided among {shard.size} devices: {error}") from error
    inner = (int(full.config.intermediate_size), int(local.config.intermediate_size))
    return TensorCuts(whole, part, inner, shard)


def _choose(skeleton: Any, specs: Sequence[TensorSpec], verdict: Verdict) -> tuple[StackSpec | None, list[Join], str]:
    """Return the fused form with its joins, or None with the reason."""
    if not verdict.fused:
        return None, [], verdict.reason
    try:
        spec = match_stack(skeleton, verdict.interleaved)
    except NoMatchError as error:
        return None, [], str(error)
    return spec, spec.joins({tensor.name: tensor for tensor in specs}), ""


def _products(skeleton: nn.Module, spec: StackSpec | None, layout: WeightLayout) -> set[str]:
    """Return the names of the matrices that only matrix products read."""
    if spec is None:
        names = {f"{name}.weight" for name, module in skeleton.named_modules() if type(module) is nn.Linear}
    else:
        joined = {tensor.name for tensor in layout.joined}
        refs = (ref for layer in spec.layers for ref in (layer.qkv, layer.out, layer.gate_up, layer.down))
        layers = {name for ref in refs for name in ((ref.name,) if f"{ref.name}.weight" in joined else ref.members)}
        names = {f"{name}.weight" for name in {*layers, spec.lm_head}}
    aliases = tied_names(skeleton)
    return names - aliases.keys() - set(aliases.values())


def _in_order(host_order: OneDnnLayout, layout: WeightLayout, names: set[str]) -> dict[str, OneDnnMatrix]:
    placed = (tensor for tensor in (*layout.tensors, *layout.joined) if tensor.name in names)
    return {tensor.name: matrix for tensor in placed if (matrix := host_order.matrix(tensor.shape, tensor.dtype))}


def _differ(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two supposedly tied tensors differ in shape, type, or their first or last bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return True
    count = min(_SAMPLE_BYTES, a.size_bytes)
    with Path(a.path).open("rb") as file_a, Path(b.path).open("rb") as file_b:
        for start in (0, a.size_bytes - count):
            file_a.seek(a.offset + start)
            file_b.seek(b.offset + start)
            if file_a.read(count) != file_b.read(count):
                return True
    return False


def _identity(layout: WeightLayout, files: Sequence[str], shard: Shard) -> str:
    """Hash the layout of the image together with its rank and the paths, sizes and modification times of its files."""
    digest = hashlib.blake2b(f"{layout.digest()} {shard.rank}/{shard.size}".encode(), digest_size=16)
    for file in files:
        status = Path(file).stat()
        digest.update(f"\n{file} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
