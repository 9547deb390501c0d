"""FSDP2 over tppo_ref's own policy and value model: the modules stay, their parameters become shards.

    build on "meta" -> shard -> read each rank's own rows from the safetensors -> the Trainer

No rank ever holds a whole model: a 32B one is 131 GB in float32. Masters are float32, computation in `compute_dtype`, gradients
are reduced in float32. Each decoder layer is one FSDP group and, with `checkpoint_layers`, is recomputed in the backward pass;
embedding, norm and head form the root group.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from scale.config import ShardingConfig
from scale.context import Context, context_of, share_rows
from scale.distributed import World
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import (
    PolicyModel,
    ValueModel,
    as_value_config,
    check_against_plain_forward,
    in_value_head,
    load_policy,
    load_value_model,
)


def decoder_layers(model: PolicyModel | ValueModel) -> nn.ModuleList:
    """The model's decoder layers: the longest list of modules in its backbone. UserError where there is none."""
    lists = [module for module in model.hf.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"model.policy: got {type(model.hf).__name__}; expected a model with a list of decoder layers to shard by")
    return max(lists, key=len)


def shard(
    model: PolicyModel | ValueModel,
    mesh: DeviceMesh,
    config: ShardingConfig,
    sync_dtype: torch.dtype | None = None,
    context: Context | None = None,
) -> None:
    """Shard a model in place over `mesh`; its parameters become DTensors under the names that they had.

    context   the ranks that share each batch that the model is called with (context.py). None: each has batches of its own

    Invariant: forward, backward and `named_tensors` give what the whole model gave, up to the rounding of `compute_dtype`.
    """
    if context is not None and context.parts > 1:
        share_rows(model, context)
    dtype = getattr(torch, config.compute_dtype)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.offload else OffloadPolicy(),
    }
    for layer in decoder_layers(model):
        if config.checkpoint_layers:
            # The module's own forward, not a wrapper: parameter names stay transformers', which checkpoints and engines rely on.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    model.register_forward_hook(_reshard_without_gradient)
    model.__dict__["named_tensors"] = functools.partial(gathered, model, sync_dtype)  # what engines are given


def _reshard_without_gradient(model: Any, inputs: Any, output: Any) -> None:
    """A forward pass that no backward follows would leave the root's parameters gathered, and stale after the next update."""
    if not torch.is_grad_enabled():
        model.reshard()


def load_sharded(
    kind: type[PolicyModel] | type[ValueModel],
    source: str | Path,
    world: World,
    config: ShardingConfig,
    *,
    seed: int = 0,
    weights: bool = True,
    sync_dtype: torch.dtype | None = None,
    **options: Any,
) -> PolicyModel | ValueModel:
    """A sharded policy or value model from a Hugging Face folder, each rank reading its own rows; `options` go to the model.

    weights      False leaves the folder's weights unread: a checkpoint brings them. Else packed and plain forward are compared
    sync_dtype   type in which `named_tensors` hands the weights to an engine; None: float32, as they are

    A config.json gives random weights under `seed`, the same on any number of ranks. A policy's folder gives a value model its
    backbone, and a new head under `seed`. UserError as `tppo_ref.rollout.models.load_policy`.
    """
    load = load_policy if kind is PolicyModel else load_value_model
    mesh = init_device_mesh("cuda" if world.device.startswith("cuda") else "cpu", (world.world,))
    context = context_of(world) if world.context_parallel > 1 else None
    if str(source).endswith(".json"):
        model = load(str(source), seed=seed, device="cpu", **options)  # random: small, or nobody would start from it
        shard(model.to(world.device), mesh, config, sync_dtype, context)
        return model
    model = empty(kind, source, **options)
    shard(model, mesh, config, sync_dtype, context)
    model.to_empty(device="cpu" if config.offload else world.device)
    _restore_buffers(model, world.device)
    if weights:
        fill(model, Path(source), seed=seed)
        inside(model, lambda: check_against_plain_forward(model))
    return model


@torch.no_grad()
def inside(model: PolicyModel | ValueModel, call: Callable[[], None]) -> None:
    """`call` in the place of the model's forward pass: there, and only there, every sharded parameter can be computed with."""
    model.__dict__["forward"] = call
    try:
        model()
    finally:
        del model.__dict__["forward"]
        for module in model.modules():
            if isinstance(module, FSDPModule):  # with reshard_after_forward false they would wait, whole, for a backward pass
                module.reshard()


def empty(kind: type[PolicyModel] | type[ValueModel], source: str | Path, **options: Any) -> PolicyModel | ValueModel:
    """The model of a folder's config.json on the meta device: shapes and no bytes."""
    import transformers

    if not (Path(source) / "config.json").is_file() and not str(source).endswith(".json"):
        raise UserError(f"model.policy: got {source}, which has no config.json; expected a model's folder or a config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.policy: got {source}; expected a config that can be read ({' '.join(str(error).split())[:200]})"
        ) from None
    with torch.device("meta"):
        model = from_config(kind, config, **options)
    if kind is PolicyModel and (Path(source) / "generation_config.json").is_file():  # an export keeps all end tokens
        model.hf.generation_config = transformers.GenerationConfig.from_pretrained(str(source), local_files_only=True)
    return model


def from_config(kind: type[PolicyModel] | type[ValueModel], config: Any, **options: Any) -> PolicyModel | ValueModel:
    """A float32 model of a transformers config, on whatever device and in whatever mode are current."""
    import transformers

    if kind is PolicyModel:
        return kind(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), **options)
    auto = transformers.AutoModelForTokenClassification
    return kind(auto.from_config(as_value_config(copy.deepcopy(config)), dtype=torch.float32), **options)


def _restore_buffers(model: nn.Module, device: str) -> None:
    """Buffers are computed when a module is built, which on "meta" computes nothing: build those modules again."""
    for module in list(model.modules()):
        if not list(module.buffers(recurse=False)):
            continue
        config = getattr(module, "config", None)
        if config is None:
            raise UserError(
                f"model.policy: got {type(module).__name__}, whose buffers cannot be rebuilt; expected an architecture without such"
            )
        fresh = type(module)(config=config)
        for name, buffer in fresh.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a Hugging Face folder holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    if not files:
        raise UserError(f"model.policy: got {folder}; expected a folder with safetensors")
    return files


@torch.no_grad()
def fill(model: PolicyModel | ValueModel, folder: Path, *, seed: int) -> None:
    """Read this rank's rows of every parameter. A value head that the folder lacks is drawn under `seed`."""
    try:
        _fill(model, weight_files(folder), folder, seed)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.policy: got {folder}; expected weights that can be read ({' '.join(str(error).split())[:200]})"
        ) from None


def _fill(model: PolicyModel | ValueModel, files: dict[str, Path], folder: Path, seed: int) -> None:
    for name, parameter in model.hf.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if name in files:
            with safe_open(files[name], "pt") as tensors:
                rows = tensors.get_slice(name)
                if list(rows.get_shape()) != list(parameter.shape):
                    raise UserError(
                        f"{files[name]}: got {name} of shape {rows.get_shape()}; expected {list(parameter.shape)}, by its config"
                    )
                local.copy_(rows[_own_rows(parameter)])
        elif parts := _experts(name, files):
            rows = _own_rows(parameter)
            for own, expert in zip(local, range(*rows.indices(len(parameter))), strict=True):
                own.copy_(torch.cat([_read(files, part.format(expert)) for part in parts]))
        elif isinstance(model, ValueModel) and in_value_head(name):
            generator = torch.Generator().manual_seed(seed)
            std = model.hf.config.initializer_range if parameter.dim() > 1 else 0.0
            whole = torch.randn(parameter.shape, generator=generator) * std
            local.copy_(whole[_own_rows(parameter)])
        else:
            raise UserError(f"model.policy: got {folder}, which lacks {name}; expected all weights of its config.json")


def _experts(name: str, files: dict[str, Path]) -> list[str]:
    """A layer's experts are one tensor [experts, rows, columns] in transformers' modules and for vLLM's loader, one of each expert
    in the files: the names that these have there, with a place for the expert's number. None where the files have no such."""
    stem, _, last = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
    found = [f"{stem}.{{}}.{part}.weight" for part in parts]
    return found if all(part.format(0) in files for part in found) else []


def _read(files: dict[str, Path], name: str) -> Tensor:
    with safe_open(files[name], "pt") as tensors:
        return tensors.get_tensor(name)


def _own_rows(parameter: Tensor) -> slice:
    """The rows of dimension 0 that this rank keeps."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(offset[0], offset[0] + shape[0])


def gathered(model: PolicyModel | ValueModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor), one at a time, so that one tensor's memory is all it takes. Every rank takes part, to the last.

    dtype   cast to, before gathering: bfloat16 halves what travels. None: as the masters are
    """
    for name, parameter in model.hf.named_parameters():
        part = parameter.detach().to(dtype or parameter.dtype)
        if isinstance(part, DTensor):  # an offloaded shard travels from its accelerator: hosts would send it over TCP
            here: Any = part.to(part.device_mesh.device_type)
            part = here.full_tensor()
        yield name, part


def checksum(model: PolicyModel | ValueModel) -> float:
    """Sum of |w| over the whole model, the same on every rank."""
    total = torch.zeros((), dtype=torch.float64)
    for parameter in model.hf.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total += local.detach().abs().sum(dtype=torch.float64).cpu()
    dist.all_reduce(total)
    return float(total)
