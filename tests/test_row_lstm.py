"""Row LSTM against its equation, pixel by pixel."""

import torch
from tiny import redraw

from pixelcnn_lit.models.row_lstm import RowLSTM, RowLSTMLayer


@torch.no_grad()
def test_a_layer_is_equation_3_written_as_a_loop_over_pixels():
    channels, states, height, width = 6, 3, 4, 5
    layer = RowLSTMLayer(channels, 2, dropout=0.0).double()
    redraw(layer)
    x, y = torch.randn(2, channels, height, width, dtype=torch.float64), torch.tensor([1, 2])
    normed, bias = layer.norm(x), layer.embed.rows(y) + layer.input_to_state.bias
    i2s, s2s = layer.input_to_state.weight[:, :, 0], layer.state_to_state.weight  # [4S,C,2], [4S,S,3]
    h, c = (torch.zeros(2, states, height + 1, width + 2, dtype=torch.float64) for _ in range(2))  # and outside
    done = torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            gates = bias + normed[:, :, i, j] @ i2s[:, :, 1].T
            if j:
                gates = gates + normed[:, :, i, j - 1] @ i2s[:, :, 0].T
            for k in range(3):
                gates = gates + h[:, :, i, j + k] @ s2s[:, :, k].T
            o, f, i_gate, g = gates.split(states, dim=1)
            c[:, :, i + 1, j + 1] = f.sigmoid() * c[:, :, i, j + 1] + i_gate.sigmoid() * g.tanh()
            h[:, :, i + 1, j + 1] = o.sigmoid() * c[:, :, i + 1, j + 1].tanh()
            done[:, :, i, j] = x[:, :, i, j] + h[:, :, i + 1, j + 1] @ layer.out.weight[:, :, 0, 0].T
    assert torch.allclose(layer(x, y), done, rtol=0, atol=1e-9)


def test_it_sees_a_triangle_up_to_the_first_row():
    net = RowLSTM((9, 15), 3, 2, 4, hidden_channels=8, n_residual=1)
    seen = net.receptive_field(8, 7)
    for i in range(8):
        up = 8 - i
        columns = seen[i].nonzero()[:, 0].tolist()
        assert columns == list(range(max(0, 7 - up - 4), min(14, 7 + up + 2) + 1))
    assert seen[8].tolist() == [3 <= j < 7 for j in range(15)]
