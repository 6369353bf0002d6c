"""A core without a machine: speaks the control protocol, started as the controlplane starts the real one.

CELLVISOR_FAKE holds JSON: {verb: error message} under "refuse", {device: reason} under "fail", words under
"do": "die-at-start", "die-at-boot", "power-off", "crash", "deaf" (never answers QUIT), "no-ready".
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time

import zmq

from cellvisor.core.custody import Custody
from cellvisor.core.errors import Conflict, UsageError
from cellvisor.core.wire import fdpass, places
from cellvisor.core.wire.messages import pack, unpack


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("--run-dir", "--token", "--log-file"):
        parser.add_argument(flag)
    for flag in ("--ready-fd", "--controlplane-pidfd"):
        parser.add_argument(flag, type=int)
    parser.add_argument("-v", action="count")
    options = parser.parse_args()
    script = json.loads(os.environ.get("CELLVISOR_FAKE", "{}"))
    do = script.get("do", [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "die-at-start" in do:
        sys.stderr.write("cellvisor: /dev/kvm: no such fake\n")
        return 2
    context = zmq.Context()
    sock = context.socket(zmq.ROUTER)
    sock.bind(f"ipc://{options.run_dir}/{places.CONTROL}")
    fds = fdpass.listen(f"{options.run_dir}/{places.FDS}")
    fds.setblocking(True)
    os.write(options.ready_fd, b"1")
    os.close(options.ready_fd)
    custody = Custody(options.token)
    parent = os.getppid()
    paused, first_entry = False, 0
    attached: set[str] = set()

    def event(name: str, /, **properties: object) -> None:
        sock.send_multipart([custody.identity.encode(), pack({"event": name, "properties": properties})])

    poller = zmq.Poller()
    poller.register(sock, zmq.POLLIN)
    poller.register(fds.fileno(), zmq.POLLIN)
    while os.getppid() == parent:
        ready = dict(poller.poll(200))
        if fds.fileno() in ready:
            with fds.accept()[0] as connection:
                packet = fdpass.receive(connection)
                assert packet is not None
                assert packet[0]["identity"] == custody.identity
                for fd in packet[1]:
                    os.close(fd)
                fdpass.send(connection, {"ok": True})
        if sock not in ready:
            continue
        identity, data = sock.recv_multipart()
        assert custody.admits(identity.decode())
        body = unpack(data)
        verb, args, answer = body["verb"], body["args"], {}
        error = None
        if verb in script.get("refuse", {}):
            error = UsageError(script["refuse"][verb])
        elif verb == "pause" and paused:
            error = Conflict("the VM is paused already")
        elif verb == "info":
            answer = {"state": "running", "first_entry_ns": first_entry, "stages": [[0x41, first_entry + 1000]]}
        elif verb == "devices":
            answer = {"devices": [{"device": device, "counters": {}} for device in attached]}
        elif verb == "call" and args["verb"] == "counters":
            answer = {"result": {"read_bytes": 4096}}
        elif verb == "quit" and "deaf" in do:
            time.sleep(60)
        if error:
            sock.send_multipart([identity, pack({"id": body["id"], "error": error.as_wire()})])
            continue
        if verb == "attach":
            attached.add(args["device"])
            reason = script.get("fail", {}).get(args["device"])
            if reason:
                event("device.failed", device=args["device"], reason=reason)
            elif "no-ready" not in do:
                event("device.ready", device=args["device"])
        if verb == "boot":
            if "die-at-boot" in do:
                os.kill(os.getpid(), signal.SIGKILL)
            event("vm.booted")
            first_entry = time.monotonic_ns()
        if verb in ("pause", "resume"):
            paused = verb == "pause"
            event(f"vm.{verb}d")
        sock.send_multipart([identity, pack({"id": body["id"], "ok": answer})])
        if verb == "boot" and "power-off" in do:
            event("vm.shutdown")
        if verb == "boot" and "crash" in do:
            event("vm.crashed", reason="an instruction nobody knows")
        if verb == "quit":
            break
    sock.close(linger=200)
    context.term()
    return 0


if __name__ == "__main__":
    sys.exit(main())
