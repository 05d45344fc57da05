"""W_c from statistics: the least-squares problems behind calibration, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# The official implementation drops singular values below this share of the largest one.
PSEUDOINVERSE_CUTOFF = 1e-10


class TokenStatistics:
    """
    Normal equations of ε ≈ x · W_c, streamed over tokens.

    Attributes:
        xx: Σ xᵀx, (coordinates of x, coordinates of x).
        xe: Σ xᵀε, (coordinates of x, hidden size).
        ee: Σ ‖ε‖².
        scale: Σ ‖original attention output‖², to which errors are relative.
        tokens: how many tokens were added.
    """

    def __init__(self, size: int, device: torch.device, outputs: int | None = None) -> None:
        self.xx = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.xe = torch.zeros(size, outputs or size, dtype=torch.float64, device=device)
        self.ee = 0.0
        self.scale = 0.0
        self.tokens = 0

    def add(self, x: torch.Tensor, error: torch.Tensor, original: torch.Tensor) -> None:
        """Add tokens: inputs x, errors ε and original attention outputs, in float64, one token a row."""
        self.xx.addmm_(x.T, x)
        self.xe.addmm_(x.T, error)
        self.ee += error.square().sum().item()
        self.scale += original.square().sum().item()
        self.tokens += x.shape[0]

    def error_before(self) -> float:
        """‖ε‖ relative to the original attention output."""
        return (self.ee / self.scale) ** 0.5

    def error_after(self, compensation: torch.Tensor) -> float:
        """‖ε − x·W_c‖ relative to the original attention output."""
        explained = 2 * (compensation * self.xe).sum() - (compensation * (self.xx @ compensation)).sum()
        return max((self.ee - explained.item()) / self.scale, 0.0) ** 0.5


class PositionMeans:
    """Means of x and ε at every position over all samples, the estimates of E(x) and E(ε) in Theorem 3.7."""

    def __init__(self, size: int, device: torch.device, outputs: int | None = None) -> None:
        self.count = torch.zeros(0, dtype=torch.float64, device=device)
        self.x = torch.zeros(0, size, dtype=torch.float64, device=device)
        self.error = torch.zeros(0, outputs or size, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, error: torch.Tensor, position: torch.Tensor) -> None:
        """Add tokens: x and ε (tokens, hidden size) in float64, and their positions (tokens,)."""
        missing = int(position.max()) + 1 - self.count.shape[0]
        if missing > 0:
            self.count = torch.cat([self.count, self.count.new_zeros(missing)])
            self.x = torch.cat([self.x, self.x.new_zeros(missing, self.x.shape[1])])
            self.error = torch.cat([self.error, self.error.new_zeros(missing, self.error.shape[1])])
        self.count.index_add_(0, position, torch.ones_like(position, dtype=torch.float64))
        self.x.index_add_(0, position, x)
        self.error.index_add_(0, position, error)

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean x and mean ε, each (positions, hidden size)."""
        seen = self.count > 0
        count = self.count[seen].unsqueeze(1)
        return self.x[seen] / count, self.error[seen] / count


def solve_ridge(xx: torch.Tensor, xe: torch.Tensor, ridge: float, parts: Sequence[int] = ()) -> torch.Tensor:
    """
    W_c that minimises Σ ‖ε − x·W_c‖² + λ‖W_c‖², with λ = `ridge` times the mean square of x's coordinates, summed.

    Args:
        xx: Σ xᵀx, (hidden size, hidden size) in float64.
        xe: Σ xᵀε, likewise.
        ridge: strength relative to the mean diagonal of `xx`, above 0.
        parts: where x is several tensors side by side, their widths; each then has a λ of its own size.
    """
    return torch.linalg.solve(regularised(xx, ridge, parts), xe)


def regularised(xx: torch.Tensor, ridge: float, parts: Sequence[int] = ()) -> torch.Tensor:
    """xx + λI as in [`solve_ridge`]."""
    widths = list(parts) or [xx.shape[0]]
    means = [part.mean().expand(part.shape) for part in xx.diagonal().split(widths)]
    return xx + ridge * torch.diag(torch.cat(means))


def solve_pseudoinverse(x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """
    W_c = V Σ⁺ Uᵀ E(ε) of Theorem 3.7.

    Args:
        x: E(x) = U Σ Vᵀ, (positions, hidden size) in float64.
        error: E(ε), likewise.
    """
    return torch.linalg.pinv(x, rtol=PSEUDOINVERSE_CUTOFF) @ error


def factorise(compensation: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The factors A·B of rank `rank` that lose least of x·W_c on the data, rather than least of W_c itself.

    Reduced-rank regression: project the least-squares solution on the leading eigenvectors of W_cᵀ · gram · W_c, the
    second moment of the fitted outputs (Izenman 1975, https://doi.org/10.1016/0047-259X(75)90042-1).

    Args:
        compensation: the solution of full rank, (hidden size, hidden size).
        gram: the second moment of x for which it is optimal, ridge included.
        rank: columns of A.

    Returns:
        A (hidden size, rank) and B (rank, hidden size), of equal norm so that both learn at one learning rate.
    """
    _, vectors = torch.linalg.eigh(compensation.T @ gram @ compensation)
    leading = vectors[:, -rank:]
    a, b = compensation @ leading, leading.T
    if not a.any():  # nothing to compensate: keep one factor away from zero, so that training can leave this point
        return leading, torch.zeros_like(b)
    balance = (a.norm() / b.norm()).sqrt()
    return a / balance, b * balance


def right_inverse(matrix: torch.Tensor, ridge: float | None) -> torch.Tensor:
    """
    M for which W = C · M makes x · W · `matrix` closest to x · C: how a compensation reaches through W_o.

    Args:
        matrix: W_o, (coordinates of all heads, hidden size) in float64.
        ridge: strength relative to the mean diagonal of matrix · matrixᵀ, so that directions which W_o almost drops do
            not get enormous weights; None for the pseudoinverse.

    Returns:
        (hidden size, coordinates of all heads).
    """
    if ridge is None:
        return torch.linalg.pinv(matrix, rtol=PSEUDOINVERSE_CUTOFF)
    return torch.linalg.solve(regularised(matrix @ matrix.T, ridge), matrix).T
