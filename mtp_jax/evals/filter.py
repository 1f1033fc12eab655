"""System calls that a program has no use for, as a seccomp filter. Floor 4.

New namespaces, mounts, memory that limits do not see (shared, by descriptor),
other processes, the kernel's keys and its tracing.
"""

import platform
import struct

# Of linux/audit.h and asm/unistd.h: architecture, clone, clone3, prlimit64, …
NUMBERS = {
  'x86_64': (
    0xC000003E, 56, 435, 302,
    (29, 64, 68, 101, 165, 166, 248, 249, 250, 272, 298, 304, 308, 310, 311,
     319, 321, 323, 425, 428, 429, 430, 438, 442, 447),
  ),
  'aarch64': (
    0xC00000B7, 220, 435, 261,
    (39, 40, 97, 117, 186, 190, 194, 217, 218, 219, 241, 265, 268, 270, 271,
     279, 280, 282, 425, 428, 429, 430, 438, 442, 447),
  ),
}  # fmt: skip
# Of linux/bpf_common.h and linux/seccomp.h.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
NEW_USER = 0x10000000  # a flag of clone
NUMBER, ARCH, FIRST = 0, 4, 16  # where a call's number and argument lie
X32 = 0x40000000  # the second set of numbers of x86_64


def packed() -> bytes:
  """Instructions of 8 bytes; none where the machine is not in NUMBERS."""
  if platform.machine() not in NUMBERS:
    return b''
  arch, clone, clone3, limit, denied = NUMBERS[platform.machine()]
  code = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL)]
  code += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM)]
  for number in denied:
    code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
  code += [(EQUAL, 0, 1, clone3), (RETURN, 0, 0, ENOSYS)]  # libc takes clone
  code += [(EQUAL, 0, 4, limit), (LOAD, 0, 0, FIRST)]
  code += [(EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
  code += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST)]
  code += [(ANY_BIT, 0, 1, NEW_USER), (RETURN, 0, 0, EPERM)]
  code += [(RETURN, 0, 0, ALLOW)]
  return b''.join(struct.pack('HBBI', *instruction) for instruction in code)
