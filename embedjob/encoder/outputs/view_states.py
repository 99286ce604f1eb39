"""View states: the hidden states of views, as poolings and heads are given them.

Legend: V views, T tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from embedjob.text.arrays import Ids
from embedjob.vectors.sparse import Row


@dataclass
class ViewStates:
    """Hidden states [V, T, D], spans and ids [V, T], and the words of each view's text.

    Spans and ids are on the host. `rows` are the sparse entries, where a head has written them.
    With `row_V` there are more spans than rows of states and ids: view v is of row `row_V[v]`.
    """

    hidden_VTD: Tensor
    span_VT: Tensor
    ids_VT: Tensor
    words: Sequence[Ids] | None = None
    rows: list[Row] | None = None
    row_V: Tensor | None = None
