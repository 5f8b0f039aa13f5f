"""What the benchmark of the host counts."""
import re

import pytest
import torch

from hrm_megatron.config import Architecture

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a CPU launches")


@pytest.fixture(scope="module")
def found(single_rank):
    """Costs by the number of layers."""
    from hrm_megatron.benchmark.host import measure_host

    return {layers: measure_host(Architecture(layers, 1536, 12, 4096, 65_536), 4096, 1, False) for layers in (1, 3)}


def test_launches_and_calls_are_counted_per_tick(found):
    one, three = (found[layers]["tick without gradient"] for layers in (1, 3))
    layer = (three.launches - one.launches) / 2
    # Four products, two norms, one rotation, two gathers of queries and of keys and values each, two kernels; zeros and
    # two copies into them; the copy of the gate and its product; SwiGLU, two sums: 21, and what a kernel does in two.
    assert 21 <= layer <= 28, layer
    # 472 on a CPU, some sixty of them around loops; it was 800 with stock forwards, stock products, and autograd
    # functions where there is no gradient.
    assert (three.calls - one.calls) / 2 < 475
    assert one.seconds > 0 and one.device_seconds is None


def test_more_ticks_with_gradient_cost_more(found):
    costs = found[1]
    fewer, more = costs["micro-batch, bp 2"], costs["micro-batch, bp 5"]
    assert 0 < costs["gradient of a tick"].launches * 3 == pytest.approx(more.launches - fewer.launches)
    assert more.calls > fewer.calls > 8 * costs["tick without gradient"].calls


def test_the_table_has_a_line_for_each(found):
    from hrm_megatron.benchmark.host import table

    head, *lines = table(found[1])
    assert head.split() == ["launches", "calls", "host", "ms", "GPU", "ms"] and len(lines) == len(found[1])
    assert all(re.search(r"\d [ ,\d]+ +-?\d+\.\d\d +$", line) for line in lines), lines


def test_what_a_gpu_compiles_into_one_kernel_counts_once():
    from hrm_megatron.benchmark.host import Launches
    from hrm_megatron.layers import functions

    x, launches = torch.randn(3, 2, 8), Launches()
    stock = functions.normalize
    with launches.of_a_gpu(), launches:
        functions.normalize(x, 1e-6)
        torch.empty(3), x.view(6, 8), x + 1
    assert launches.count == 2 and functions.normalize is stock
