"""Small heads that tasks and fine-tuning put on an encoder."""

from torch import Tensor, nn


def linear_head(
    n_in: int,  # Features that enter
    n_out: int,  # Classes, or numbers to predict
    dropout: float = 0.0,  # Share of the features dropped in training
) -> nn.Sequential:
    """Dropout and one linear layer: `(B, n_in)` to `(B, n_out)`."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(n_in, n_out))


def mlp(
    n_in: int,  # Features that enter
    n_hidden: int,  # Width of the hidden layers
    n_out: int,  # Features that come out
    n_layers: int = 2,  # Linear layers; 1 is a linear head
    batchnorm: bool = False,  # Normalize each hidden layer before its ReLU
    last_batchnorm: str | None = None,  # Normalize what comes out: 'affine', or 'plain', without scale and shift
    last_bias: bool = True,  # Whether the last layer has a bias; none before a batch norm, which takes it away again
    gelu: bool = False,  # GELU in place of ReLU
) -> nn.Sequential:
    """A projector or predictor: `(B, n_in)` to `(B, n_out)`, linear, (batch norm,) ReLU, ..., linear (, batch norm).

    With 2 layers the projection head of SimCLR (Chen et al., 2020), whose code has the batch norms.
    """
    layers = []
    for width_in in [n_in, *[n_hidden] * (n_layers - 2)][: n_layers - 1]:
        layers.append(nn.Linear(width_in, n_hidden, bias=not batchnorm))  # A batch norm has a bias of its own
        layers += [nn.BatchNorm1d(n_hidden)] * batchnorm + [nn.GELU() if gelu else nn.ReLU(inplace=True)]
    layers.append(nn.Linear(n_hidden if n_layers > 1 else n_in, n_out, bias=last_bias and not last_batchnorm))
    if last_batchnorm:
        layers.append(nn.BatchNorm1d(n_out, affine=last_batchnorm == "affine"))
    return nn.Sequential(*layers)


def draw_small_weights(module: nn.Module) -> None:
    """Draws the weights of a linear layer anew, deviation 0.02, bias 0 (ViT, DINO, I-JEPA); for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Classifier(nn.Module):
    """Encoder and head: (B, C, H, W) -> (B, classes)."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))
