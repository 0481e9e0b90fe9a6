"""Diagonal BiLSTM against its equation, pixel by pixel."""

import torch
from tiny import redraw
from torch import Tensor

from pixelcnn_lit.models.diagonal_bilstm import DiagonalLayer, skewed, straight


def test_skewing_makes_columns_of_diagonals_and_can_be_undone():
    x = torch.arange(1, 13).view(1, 3, 4, 1)
    rows = [[1, 2, 3, 4, 0, 0], [0, 5, 6, 7, 8, 0], [0, 0, 9, 10, 11, 12]]
    assert skewed(x)[0, ..., 0].tolist() == rows
    assert torch.equal(straight(skewed(x)), x)


@torch.no_grad()
def test_a_layer_is_equation_3_written_as_a_loop_over_pixels():
    states, height, width = 3, 4, 5
    layer = DiagonalLayer(6, 2, dropout=0.0).double()
    redraw(layer)
    x, y = torch.randn(2, 6, height, width, dtype=torch.float64), torch.tensor([1, 2])
    normed, bias = layer.norm(x), layer.embed.rows(y) + layer.input_to_state.bias
    inputs = torch.einsum("bchw,oc->hwbo", normed, layer.input_to_state.weight[..., 0, 0]) + bias

    def states_from(side: int) -> dict[tuple[int, int], Tensor]:
        """Of the left LSTM for -1, of the right one for 1, by row and column."""
        of_this = slice(0, 4 * states) if side < 0 else slice(4 * states, None)
        above, beside = layer.state_to_state[side > 0].weight.unbind(-1)
        h, c, nothing = {}, {}, torch.zeros(2, states, dtype=torch.float64)
        for i in range(height):
            for j in range(width)[::-side]:
                before = h.get((i, j + side), nothing), h.get((i - 1, j), nothing)
                gates = inputs[i, j][:, of_this] + before[0] @ beside.T + before[1] @ above.T
                o, f, i_gate, g = gates.split(states, dim=1)
                c[i, j] = f.sigmoid() * c.get((i, j + side), nothing) + i_gate.sigmoid() * g.tanh()
                h[i, j] = o.sigmoid() * c[i, j].tanh()
        return h

    left, right = states_from(-1), states_from(1)
    done = layer(x, y)
    for i in range(height):
        for j in range(width):
            h = left[i, j] + right[i - 1, j] if i else left[i, j]
            expected = x[:, :, i, j] + h @ layer.out.weight[:, :, 0, 0].T
            assert torch.allclose(done[:, :, i, j], expected, rtol=0, atol=1e-9)
