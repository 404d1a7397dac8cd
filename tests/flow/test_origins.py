import torch

from modegpt_graph.flow.classes import Classes
from modegpt_graph.flow.layout import kinds_of, members_of, rows_to_ranges
from modegpt_graph.flow.shrink import origins


def test_each_element_comes_from_where_its_label_was() -> None:
    labels = torch.tensor([[3, 1, 2, 0], [7, 5, 6, 4]])
    smaller = torch.tensor([[2, 3], [4, 7]])
    assert origins(labels, smaller, 1).tolist() == [[2, 0], [3, 0]]


def test_equal_labels_keep_their_order() -> None:
    """Two heads of a group carry the same value features one after the other."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert origins(labels, torch.tensor([2, 0, 2, 0]), 0).tolist() == [2, 0, 5, 3]


def test_classes_join_chains_and_leave_the_rest_alone() -> None:
    classes = Classes(7)
    classes.join(torch.tensor([0, 5, -1]), torch.tensor([3, 3, 2]))
    classes.join(torch.tensor([4]), torch.tensor([6]))
    assert classes.of(torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])).tolist() == [0, 1, 2, 0, 4, 0, 4, -1]


def test_blocks_by_size_largest_first() -> None:
    kinds = kinds_of(torch.tensor([[0, 1, 0, 1, 8, 9], [4, 5, 4, 5, 6, 7]]))
    assert [(kind.block_size, kind.count) for kind in kinds] == [(2, 2), (1, 2)]
    assert kinds[0].positions[0].tolist() == [[0, 2], [1, 3]]


def test_members_of_grouped_heads() -> None:
    """Two heads share the blocks {0} and {1}, each a pair of rows: the first rows are the first head's."""
    fibres = torch.tensor([[0, 1, 0, 1]])
    carried = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    assert members_of(fibres, carried, torch.arange(8)).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


def test_ranges() -> None:
    assert rows_to_ranges(torch.tensor([0, 1, 2, 5, 7, 8])) == ((0, 3), (5, 6), (7, 9))
