from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lifelong_ens import ensembles
from lifelong_ens.ensembles.sparse_inference import CSRLinear, export_csr
from lifelong_ens.errors import InputError
from lifelong_ens.layers.sparse import Masks
from lifelong_ens.networks import mlp, resnet20
from lifelong_ens.training.fit import Fit


def sparse(network: nn.Module, sparsity: float = 0.9) -> nn.Module:
    Masks.by_magnitude(network, sparsity)
    return network


def csr_layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, CSRLinear)]


@pytest.mark.parametrize("rows", [1, 2, 65])
def test_answers_are_those_of_the_dense_network(rows):
    torch.manual_seed(0)
    network = sparse(mlp(10, input_shape=(1, 8, 8), hidden=(60, 50)))
    exported = export_csr(network)
    assert csr_layers(exported) == ["features.1", "features.3", "fc"]
    x = torch.randn(rows, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), network(x), rtol=1e-5, atol=1e-5)
    assert csr_layers(network) == []
    assert isinstance(network.features[1], nn.Linear)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_takes_inputs_of_any_rank(shape, bias):
    layer = sparse(nn.Linear(7, 4, bias=bias), 0.8)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(export_csr(layer, 0.3)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_layers_above_the_density_stay_dense():
    network = nn.Sequential(sparse(nn.Linear(10, 10), 0.8), sparse(nn.Linear(10, 10), 0.7), nn.Linear(10, 2))
    assert csr_layers(export_csr(network)) == ["0"]
    assert csr_layers(export_csr(network, max_density=0.3)) == ["0", "1"]
    with pytest.raises(InputError, match=r"density of at most 0\.1"):
        export_csr(network, max_density=0.1)
    with pytest.raises(InputError, match="nothing to gain"):
        export_csr(resnet20(10, width=4))


def test_an_encoder_layer_leaves_its_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.TransformerEncoder(layer, 2).eval()
    for module in network.modules():
        if type(module) is nn.Linear:
            sparse(module)
    exported = export_csr(network)
    assert len(csr_layers(exported)) == 4
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), network(x), rtol=1e-5, atol=1e-5)


def test_a_whole_ensemble_can_be_exported(digits):
    build = functools.partial(mlp, 10, input_shape=(1, 8, 8), hidden=(100, 100))
    fit = Fit(epochs=1, batch_size=32)
    ensemble = ensembles.fit_static_sparse(build, digits[0], num_members=2, fit=fit, sparsity=0.9)
    exported = export_csr(ensemble)
    assert len(csr_layers(exported)) == 4
    x, _ = digits[2].batch(torch.arange(30))
    with torch.no_grad():
        torch.testing.assert_close(exported.probs(x), ensemble.probs(x), rtol=1e-5, atol=1e-5)
