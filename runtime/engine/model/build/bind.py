"""Puts the tensors of a weight buffer into a module."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from common.model_key import Quantization
from runtime.checkpoint.adapter_layout import AdapterTarget
from runtime.checkpoint.meta_model import parent_of, tied_names
from runtime.engine.model.run.adapters import AdapterSite, StepPort
from runtime.engine.model.run.linear import LinearModule, make_linear


def bind(
    model: nn.Module,
    views: Mapping[str, Tensor],
    quantization: Quantization,
    port: StepPort | None = None,
    targets: Sequence[AdapterTarget] = (),
) -> None:
    """Hang `views` into the module under their names, aliases included; linears are replaced by twins that compute on them.

    Buffers that no checkpoint brings move to the views' device. The linears named in `targets` add the adapters that `port` carries.
    """
    sites = {target.name: AdapterSite(number, (target.out_features,)) for number, target in enumerate(targets)}
    aliases = tied_names(model)
    device = next(iter(views.values())).device
    linears = dict(views)
    linears |= {alias: views[owner] for alias, owner in aliases.items()}
    for name, old in list(model.named_modules()):
        if type(old) is nn.Linear:
            parent, leaf = parent_of(model, name)
            linear = make_linear(name, linears, quantization)
            setattr(parent, leaf, LinearModule(linear, old.in_features, old.out_features, port, sites.get(name)))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        parent, leaf = parent_of(model, name)
        parent._parameters[leaf] = nn.Parameter(
            views[aliases.get(name, name)].view(parameter.shape), requires_grad=False
        )
    for name, buffer in list(model.named_buffers()):
        parent, leaf = parent_of(model, name)
        parent._buffers[leaf] = views[name].view(buffer.shape) if name in views else buffer.to(device)
