"""A seccomp filter that denies system calls which programs do not need.

New namespaces, mounts, memory outside of the limits (shared, by descriptor),
other processes, kernel keys and tracing.
"""

import platform
import struct

# From linux/audit.h and asm/unistd.h: architecture, clone, clone3, prlimit64,
# (socket, socketpair), and the denied ones. For x86_64: new namespaces and
# mounts (165, 166, 272, 303, 304, 308, 428-430, 442), memory of others or
# outside of limits (29, 64, 68, 310, 311, 319, 323, 447), tracing (101, 298, 312,
# 321, 438, 440), keys (248-250), io_uring (425-427), queues (240), file watches
# (253, 254, 294, 300), signals by descriptor (424, 434), locks on files
# of the host (73), process scheduling (135, 154, 237, 238, 256, 279, 450).
NUMBERS = {
  'x86_64': (
    0xC000003E,
    56,
    435,
    302,
    (41, 53),
    (
      29,
      64,
      68,
      73,
      101,
      135,
      154,
      165,
      166,
      237,
      238,
      240,
      248,
      249,
      250,
      253,
      254,
      256,
      272,
      279,
      294,
      298,
      300,
      303,
      304,
      308,
      310,
      311,
      312,
      319,
      321,
      323,
      424,
      425,
      426,
      427,
      428,
      429,
      430,
      434,
      438,
      440,
      442,
      447,
      450,
    ),
  ),
  'aarch64': (
    0xC00000B7,
    220,
    435,
    261,
    (198, 199),
    (
      26,
      27,
      32,
      39,
      40,
      92,
      97,
      117,
      180,
      186,
      190,
      194,
      217,
      218,
      219,
      235,
      237,
      238,
      239,
      241,
      262,
      264,
      265,
      268,
      270,
      271,
      272,
      279,
      280,
      282,
      424,
      425,
      426,
      427,
      428,
      429,
      430,
      434,
      438,
      440,
      442,
      447,
      450,
    ),
  ),
}
FAMILIES = 1, 2, 10  # AF_UNIX, AF_INET, AF_INET6: covered by network namespaces
# From linux/bpf_common.h and linux/seccomp.h.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
EAFNOSUPPORT = 0x50061
NEW_USER = 0x10000000  # a flag of clone
NUMBER, ARCH, FIRST = 0, 4, 16  # offsets of a call's number, architecture and first argument
X32 = 0x40000000  # the x32 call numbers of x86_64


def packed() -> bytes:
  """Returns the filter, 8 bytes per instruction; b'' if the machine is not in NUMBERS."""
  if platform.machine() not in NUMBERS:
    return b''
  arch, clone, clone3, limit, sockets, denied = NUMBERS[platform.machine()]
  code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL)]
  code += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM)]
  for number in denied:
    code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
  for number in sockets:
    left = len(FAMILIES)
    code += [(EQUAL, 0, left + 3, number), (LOAD, 0, 0, FIRST)]
    code += [(EQUAL, left - i, 0, x) for i, x in enumerate(FAMILIES)]
    code += [(RETURN, 0, 0, EAFNOSUPPORT), (RETURN, 0, 0, ALLOW)]
  code += [(EQUAL, 0, 1, clone3), (RETURN, 0, 0, ENOSYS)]  # libc falls back to clone
  code += [(EQUAL, 0, 4, limit), (LOAD, 0, 0, FIRST)]
  code += [(EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
  code += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST)]
  code += [(ANY_BIT, 0, 1, NEW_USER), (RETURN, 0, 0, EPERM)]
  code += [(RETURN, 0, 0, ALLOW)]
  return b''.join(struct.pack('HBBI', *instruction) for instruction in code)
