"""No more holders than slots, and a dead holder's slot is free."""

import os
import threading
import time

from fedtune_client.slots import Slots


def test_never_more_than_so_many_at_once(tmp_path):
    inside, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        with Slots(tmp_path, 2)():
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert most == 2


def test_the_slot_of_a_killed_process_is_free(tmp_path):
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Slots(tmp_path, 1)():
            os.write(writable, b"x")
            time.sleep(60)
    os.read(readable, 1)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    with Slots(tmp_path, 1)():
        pass


def test_an_error_inside_gives_the_slot_back(tmp_path):
    slots = Slots(tmp_path, 1)
    for _ in range(2):
        try:
            with slots():
                raise RuntimeError
        except RuntimeError:
            continue
    with slots():
        pass
