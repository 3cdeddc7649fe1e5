"""transfer.py: constants are made once, and none of a trace or without gradients is kept."""

import pytest
import torch

from selfsup_fastai.transfer import constant, sent
from tests.fake_gpu import GPU, fake_gpu

CPU = torch.device("cpu")


def test_a_constant_is_made_once():
    nested = ((1.0, 2.0), (3.0, 4.0))
    assert constant(nested, torch.float32, CPU) is constant(nested, torch.float32, CPU)
    assert constant(nested, torch.float64, CPU).tolist() == [[1, 2], [3, 4]]
    assert constant((1,), torch.long, CPU).dtype == torch.int64


def test_what_is_made_in_inference_mode_is_not_kept():
    with torch.inference_mode():
        assert constant((5.0, 6.5), torch.float32, CPU).is_inference()
    weight = torch.ones(2, requires_grad=True)
    (weight * constant((5.0, 6.5), torch.float32, CPU)).sum().backward()
    assert weight.grad.tolist() == [5, 6.5]


def test_what_is_made_in_a_trace_is_not_kept():
    with fake_gpu():
        assert constant((7.0, 8.5), torch.float32, GPU).device == GPU
    with torch._subclasses.FakeTensorMode():
        constant((7.0, 8.5), torch.float32, CPU)
    assert constant((7.0, 8.5), torch.float32, CPU).tolist() == [7, 8.5]


def test_exported_programs_hold_constants_that_were_used_before():
    class Scaled(torch.nn.Module):
        def forward(self, x):
            return x * constant((2.0, 3.0), x.dtype, x.device)

    constant((2.0, 3.0), torch.float32, CPU)
    program = torch.export.export(Scaled(), (torch.ones(4, 2),))
    assert program.module()(torch.ones(4, 2))[0].tolist() == [2, 3]
    assert constant((2.0, 3.0), torch.float32, CPU).tolist() == [2, 3]


def test_tensors_are_sent_to_where_they_are_asked_for():
    x = torch.arange(6).view(2, 3).T
    assert sent(x, "cpu") is x
    with fake_gpu() as waits:
        assert sent(x, GPU).device == GPU and not +waits.found


def test_what_torch_func_makes_is_not_kept():
    def double(x):
        return (x * constant((9.0, 10.5), x.dtype, x.device)).sum()

    assert torch.func.grad(double)(torch.ones(2)).tolist() == [9, 10.5]
    torch.func.functionalize(double)(torch.ones(2))
    kept = constant((9.0, 10.5), torch.float32, CPU)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept) and not torch._is_functional_tensor(kept)


@pytest.mark.filterwarnings("ignore")  # of the tracer: it keeps constants
def test_it_is_compiled_and_traced_in_one_piece():
    def scaled(x):
        return x * constant((11.0, 12.5), x.dtype, x.device)

    for _ in range(2):  # with nothing kept, and after use
        torch._dynamo.reset()
        assert torch.compile(scaled, backend="eager", fullgraph=True)(torch.ones(2)).tolist() == [11, 12.5]
        assert torch.jit.trace(scaled, torch.ones(2))(torch.ones(2)).tolist() == [11, 12.5]
        assert scaled(torch.ones(2)).tolist() == [11, 12.5]
