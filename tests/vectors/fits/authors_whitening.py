"""BERT-whitening as its authors compute it."""

import numpy as np
import numpy.typing as npt


def bert_whitening(
    vectors_RD: npt.NDArray[np.float32], dimensions: int
) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and bias of the authors' code: compute_kernel_bias of BERT-whitening.

    The sign of a column is the library's.
    """
    wide = vectors_RD.astype(np.float64)
    mu = wide.mean(axis=0, keepdims=True)
    cov = np.cov(wide.T)
    u, s, _ = np.linalg.svd(cov)
    kernel = np.dot(u, np.diag(1 / np.sqrt(s)))[:, :dimensions]
    signs = np.sign(kernel[np.abs(kernel).argmax(axis=0), np.arange(dimensions)])
    return kernel * signs, -mu
