"""Checkpoints of the Hugging Face hub: hf:OWNER/NAME[@REVISION], by huggingface_hub and in
its cache, also offline (HF_HUB_OFFLINE=1)."""

import re

from mtp_jax.interop import files
from mtp_jax.io import jsonl, paths

PREFIX = 'hf:'
NAME = re.compile(r'hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')
# Weights in safetensors, and descriptions; no code and no other format.
FILES = ['*.json', '*.safetensors', '*.model', '*.jinja', '*.txt']


def is_name(path: str) -> bool:
  return path.startswith(PREFIX)


def fetch(name: str) -> str:
  """Returns the folder of a checkpoint of the hub, downloaded if it is not in the cache.

  Raises:
    InputError: not a name, no such checkpoint, no access, or no network.
  """
  match = NAME.fullmatch(name)
  if not match:
    raise paths.InputError(name, 'must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION')
  files.need('huggingface_hub', 'hf')
  import huggingface_hub
  from huggingface_hub import errors

  repository, revision = match.groups()
  try:
    return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=FILES)
  except errors.GatedRepoError as error:
    raise paths.InputError(
      name, 'is gated: accept its terms on the hub, then hf auth login'
    ) from error
  except errors.RevisionNotFoundError as error:
    raise paths.InputError(name, f'has no revision {revision}') from error
  except errors.RepositoryNotFoundError as error:
    raise paths.InputError(name, 'no such model on the hub, or no access to it') from error
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
    raise paths.InputError(
      name, 'is not in the cache of the hub, and the hub cannot be reached'
    ) from error
  except (OSError, ValueError, errors.HfHubHTTPError) as error:
    raise paths.InputError(name, f'cannot be fetched: {jsonl.one_line(error)}') from error
