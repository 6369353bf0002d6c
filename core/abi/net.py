"""Virtio network device (virtio 1.2, 5.1): feature masks, config space, frame header, control queue."""

from __future__ import annotations

from struct import Struct

from cellvisor.core._native import _native

_lib = _native.lib


def _mask(name: str) -> int:
    bit: int = getattr(_lib, f"VIRTIO_NET_F_{name}")
    return 1 << bit


F_CSUM = _mask("CSUM")
F_GUEST_CSUM = _mask("GUEST_CSUM")
F_MTU = _mask("MTU")
F_MAC = _mask("MAC")
F_GUEST_TSO4 = _mask("GUEST_TSO4")
F_GUEST_TSO6 = _mask("GUEST_TSO6")
F_GUEST_ECN = _mask("GUEST_ECN")
F_GUEST_UFO = _mask("GUEST_UFO")
F_HOST_TSO4 = _mask("HOST_TSO4")
F_HOST_TSO6 = _mask("HOST_TSO6")
F_HOST_ECN = _mask("HOST_ECN")
F_HOST_UFO = _mask("HOST_UFO")
F_MRG_RXBUF = _mask("MRG_RXBUF")
F_STATUS = _mask("STATUS")
F_CTRL_VQ = _mask("CTRL_VQ")
F_CTRL_RX = _mask("CTRL_RX")
F_CTRL_VLAN = _mask("CTRL_VLAN")
F_CTRL_RX_EXTRA = _mask("CTRL_RX_EXTRA")
F_GUEST_ANNOUNCE = _mask("GUEST_ANNOUNCE")
F_MQ = _mask("MQ")
F_CTRL_MAC_ADDR = _mask("CTRL_MAC_ADDR")

CONFIG = Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu: what the offered features make valid (5.1.4)
HEADER = Struct("<BBHHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers (5.1.6)
NUM_BUFFERS = 10  # offset of num_buffers, a le16, in it

# --- Config status and the control queue (5.1.6.5) ------------------------------------------------------
S_LINK_UP: int = _lib.VIRTIO_NET_S_LINK_UP
S_ANNOUNCE: int = _lib.VIRTIO_NET_S_ANNOUNCE
OK: int = _lib.VIRTIO_NET_OK
ERR: int = _lib.VIRTIO_NET_ERR
CTRL_RX: int = _lib.VIRTIO_NET_CTRL_RX
CTRL_RX_PROMISC: int = _lib.VIRTIO_NET_CTRL_RX_PROMISC
CTRL_RX_ALLMULTI: int = _lib.VIRTIO_NET_CTRL_RX_ALLMULTI
CTRL_RX_ALLUNI: int = _lib.VIRTIO_NET_CTRL_RX_ALLUNI
CTRL_RX_NOMULTI: int = _lib.VIRTIO_NET_CTRL_RX_NOMULTI
CTRL_RX_NOUNI: int = _lib.VIRTIO_NET_CTRL_RX_NOUNI
CTRL_RX_NOBCAST: int = _lib.VIRTIO_NET_CTRL_RX_NOBCAST
CTRL_MAC: int = _lib.VIRTIO_NET_CTRL_MAC
CTRL_MAC_TABLE_SET: int = _lib.VIRTIO_NET_CTRL_MAC_TABLE_SET
CTRL_MAC_ADDR_SET: int = _lib.VIRTIO_NET_CTRL_MAC_ADDR_SET
CTRL_VLAN: int = _lib.VIRTIO_NET_CTRL_VLAN
CTRL_VLAN_ADD: int = _lib.VIRTIO_NET_CTRL_VLAN_ADD
CTRL_VLAN_DEL: int = _lib.VIRTIO_NET_CTRL_VLAN_DEL
CTRL_ANNOUNCE: int = _lib.VIRTIO_NET_CTRL_ANNOUNCE
CTRL_ANNOUNCE_ACK: int = _lib.VIRTIO_NET_CTRL_ANNOUNCE_ACK
CTRL_MQ: int = _lib.VIRTIO_NET_CTRL_MQ
CTRL_MQ_VQ_PAIRS_SET: int = _lib.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
