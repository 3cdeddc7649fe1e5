"""Teachers: what they copy, what they average, what they leave alone."""

from copy import deepcopy

import torch
from torch import nn

from selfsup_fastai.encoders.teacher import Teacher


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = net()
        self.teacher = Teacher(self.student)


def test_parameters_are_a_running_average_and_buffers_its_own():
    student = net()
    teacher = Teacher(student)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
        student[1].running_mean.add_(5)
    teacher.follow(0.9)
    for old, own, new in zip(before, teacher.parameters(), student.parameters()):
        torch.testing.assert_close(own, 0.9 * old + 0.1 * new)
    assert teacher.net[1].running_mean.abs().max() == 0
    teacher(torch.randn(8, 3, 9, 9))
    assert teacher.net[1].running_mean.abs().max() > 0  # in training mode it tracks batches of its own


def test_nothing_flows_into_it_and_nothing_is_trained():
    teacher = Teacher(net())
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    assert not teacher(x).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())


def test_its_weights_are_saved_once_and_the_student_not_with_it():
    both = Both()
    assert {k.split(".")[0] for k in both.state_dict()} == {"student", "teacher"}
    assert len(both.teacher.state_dict()) == len(both.student.state_dict())
    assert len(list(both.parameters())) == 2 * len(list(both.student.parameters()))


def test_a_copy_of_a_model_has_a_teacher_that_follows_the_copy():
    both = deepcopy(Both())
    with torch.no_grad():
        both.student[0].weight.fill_(3)
    both.teacher.follow(0)
    assert (both.teacher.net[0].weight == 3).all()
