import torch

from embedjob.encoder.batching.transfers import copy_to_host, to_device

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied_and_nothing_is_waited_for() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    landing = copy_to_host(to_device(tensor, CPU))
    assert landing.arrival is None
    assert landing.wait() == 0.0
    assert landing.host.data_ptr() == tensor.data_ptr()
