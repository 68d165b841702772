"""One BLAS thread inside the block, as many as before after it."""

import threading

import pytest

from fedtune.blas import _controls, one_thread

controls = _controls()
pytestmark = pytest.mark.skipif(controls is None, reason="numpy is linked to another BLAS than OpenBLAS")


def test_threads_are_one_inside_and_come_back():
    get, put = controls
    before = get()
    try:
        put(2)
        with one_thread(), one_thread():
            assert get() == 1
        assert get() == 2
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / 0
        assert get() == 2
    finally:
        put(before)


def test_blocks_of_several_threads_do_not_overlap():
    """Else one that ends would give its threads back to another that still works."""
    get, seen, inside = controls[0], [], threading.Semaphore(1)

    def work():
        for _ in range(200):
            with one_thread():
                assert inside.acquire(blocking=False)
                seen.append(get())
                inside.release()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [1] * 800
