"""Planning for models on the meta device: the graph is the one that the model with weights gives, and nothing of its size is allocated."""

import pytest
import torch

from paretorch.budget import Budget
from paretorch.capture import capture
from paretorch.ir.errors import ArtifactError, BudgetError, InputError, PlanError
from paretorch.ir.hash import structural_hash
from paretorch.optimize import optimize
from paretorch.rewrites.normalize import normalize
from tests import tiny_transformers


def twins(name):
    """A model with weights, the same without, and inputs."""
    model, inputs = tiny_transformers.make(name)
    with torch.device("meta"):
        meta = tiny_transformers._entries()[name]()[0].eval()
    return model, meta, inputs


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama", "whisper"])
def test_same_graph_as_with_weights(name):
    model, meta, inputs = twins(name)
    graph = normalize(capture(meta, inputs).graph)
    assert not graph.has_weights
    assert structural_hash(graph) == structural_hash(normalize(capture(model, inputs).graph))
    assert "f32[16]" in str(graph), "it prints"


def test_inputs_on_the_meta_device_give_the_same_graph():
    _, meta, inputs = twins("llama")
    of_meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    graphs = [normalize(capture(meta, given).graph) for given in (inputs, of_meta)]
    assert structural_hash(graphs[0]) == structural_hash(graphs[1])


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # the latter multiplies by a number that is a weight
def test_the_plan_fits_the_model_with_weights(name):
    model, meta, inputs = twins(name)
    planned = optimize(meta, inputs, target="cuda:h100")
    assert planned.plan.exact, "rules were found to pay"
    assert any("no weights" in note for note in planned.report.notes)
    with pytest.raises(PlanError, match=f"made for the runtime {planned.plan.runtime}, which cannot be used here"):
        planned.plan.apply(model, inputs)
    fast = planned.plan.apply(model, inputs, target="cpu:eager")
    assert fast.plan.exact == planned.plan.exact
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_model_larger_than_memory():
    """Two layers of 51 GB, planned for a device with 24 GB."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=24576, num_hidden_layers=2, num_attention_heads=192, intermediate_size=65536, vocab_size=1000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    planned = optimize(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}, target="cuda:l4")
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights > 50e9
    assert weights < planned.report.peak_memory_bytes < 1.1 * weights
    assert any("has 24 GB" in note for note in planned.report.notes)
    floor = weights / planned.session.target.device.bandwidth_bytes_per_s
    assert 0.9 * floor < planned.report.predicted_seconds < 3 * floor, "sixteen tokens read every weight once"


def test_what_needs_weights_is_refused():
    _, meta, inputs = twins("bert")
    with pytest.raises(BudgetError, match="meta device"):
        optimize(meta, inputs, budget=Budget(drift=0.1), data=[inputs])
    planned = optimize(meta, inputs, target="cuda:h100")
    with pytest.raises(InputError, match="without weights"):
        planned(**inputs)
    with pytest.raises(ArtifactError, match="without weights"):
        planned.save("nowhere.paretorch")
