"""All memory of a kernel except registers: global memory, tensor maps, mbarriers, shared memory."""

import numpy as np

from emulator.errors import EmulatorError

SHARED_BYTES = 232448  # the most a block may have on sm_90
SHARED_BASE = 1024  # where `global_smem` starts: not 0, so that a forgotten base address shows
MAP_BASE = 0x7E0000000000  # of a parameter's generic address; its own fits into 32 bits
RANK_SHIFT = 24  # a shared::cluster address is the block's own plus (rank + 1) << RANK_SHIFT


class GlobalMemory:
    """Buffers at invented addresses, far apart: one byte outside any of them is an error."""

    def __init__(self):
        self.buffers = []
        self.next = 0x10000000

    def add(self, array):
        """C-contiguous array -> its address. The array itself is read and written."""
        assert array.flags.c_contiguous
        data = array.reshape(-1).view(np.uint8)
        base = self.next
        self.next += (len(data) + 4095) // 4096 * 4096 + 65536
        self.buffers.append((base, data))
        return base

    def bytes(self, address, count):
        """The `count` bytes at `address`, as a view."""
        for base, data in self.buffers:
            if base <= address and address + count <= base + len(data):
                return data[address - base : address - base + count]
        raise EmulatorError(f"global access of {count} bytes out of bounds at {address:#x}")

    def indices(self, addresses, count):
        """Addresses in one buffer -> (its data, byte indices (len(addresses), count))."""
        for base, data in self.buffers:
            offset = addresses - base
            if 0 <= offset[0] < len(data):
                if offset.min() < 0 or offset.max() + count > len(data):
                    break
                return data, offset[:, None] + np.arange(count)
        bad = ", ".join(hex(int(a)) for a in addresses[:4])
        raise EmulatorError(f"global access of {count} bytes out of bounds, near {bad}")


class TensorMap:
    """A TMA descriptor. array: the tensor, box: the shape of one message, swizzle in bytes (0, 32, 64 or 128)."""

    def __init__(self, array, box, swizzle):
        assert array.ndim == len(box)
        if max(box) > 256 or (swizzle and box[-1] * array.itemsize > swizzle):
            raise EmulatorError(f"a TMA box {box} may have 256 elements a side and {swizzle} bytes in its last")
        if any(stride % 16 for stride in array.strides[:-1]) or array.strides[-1] != array.itemsize:
            raise EmulatorError(f"TMA strides must be multiples of 16 bytes and are {array.strides}")
        self.array, self.box, self.swizzle = array, tuple(box), swizzle
        self.bytes = int(np.prod(box)) * array.itemsize

    def read(self, coordinates):
        """coordinates: innermost first, as in PTX. Outside the tensor there are zeros."""
        tile = np.zeros(self.box, self.array.dtype)
        source, target = self._windows(coordinates)
        tile[target] = self.array[source]
        return tile.reshape(-1).view(np.uint8)

    def write(self, coordinates, data):
        source, target = self._windows(coordinates)
        self.array[source] = data.view(self.array.dtype).reshape(self.box)[target]

    def _windows(self, coordinates):
        in_array, in_box = [], []
        for start, count, size in zip(coordinates[::-1], self.box, self.array.shape):
            first, last = max(start, 0), max(min(start + count, size), max(start, 0))
            in_array.append(slice(first, last))
            in_box.append(slice(first - start, last - start))
        return tuple(in_array), tuple(in_box)


def swizzle(addresses, span):
    """Byte addresses -> their places under a swizzle of `span` bytes (TMA, wgmma): 16-byte chunks xor the row."""
    return addresses ^ (addresses >> 3 & {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[span])


class Mbarrier:
    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, count=1, expected_bytes=0):
        self.bytes += expected_bytes
        self.pending -= count
        if self.pending < 0:
            raise EmulatorError("more arrivals at an mbarrier than its count")
        self._complete()

    def receive(self, count):
        self.bytes -= count
        self._complete()

    def _complete(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class SharedMemory:
    """A block's shared memory, 0xff (NaN in every type) until written.

    Bytes written by ordinary stores are invisible to TMA and wgmma until the writing warp executes
    `fence.proxy.async`: `async_read` refuses them.
    """

    def __init__(self):
        self.data = np.full(SHARED_BASE + SHARED_BYTES, 0xFF, np.uint8)
        self.unfenced = np.zeros(len(self.data), np.int8)  # 1 + the warp that wrote, 0 = visible
        self.barriers = {}

    def inside(self, indices):
        """The indices, if all of them are bytes that a block may have."""
        if indices.min() < SHARED_BASE or indices.max() >= len(self.data):
            raise EmulatorError(
                f"shared memory has no bytes {indices.min() - SHARED_BASE} to {indices.max() - SHARED_BASE}"
            )
        return indices

    def read(self, indices):
        return self.data[self.inside(indices)]

    def write(self, indices, data, warp):
        self.data[self.inside(indices)] = data
        self.unfenced[indices] = 1 + warp

    def fence(self, warp):
        self.unfenced[self.unfenced == 1 + warp] = 0

    def async_read(self, indices):
        if self.unfenced[self.inside(indices)].any():
            raise EmulatorError("TMA or wgmma reads shared memory written without fence.proxy.async")
        return self.data[indices]

    def async_write(self, indices, data):
        self.data[self.inside(indices)] = data
        self.unfenced[indices] = 0

    def barrier(self, address):
        if address not in self.barriers:
            raise EmulatorError(f"no mbarrier at shared offset {address - SHARED_BASE}")
        return self.barriers[address]
