"""smolstack in the Foundation Model Stack (ibm-fms): extra ``fms``.

Importing this package registers the architecture ``idefics3`` with a variant per published
checkpoint. From then on ``fms.models.get_model("idefics3", "smolvlm-256m", model_path=…,
source="hf")``, ``fms.models.get_model("hf_pretrained", model_path=…)``,
``fms.utils.generation.generate`` and ``fms.models.hf.to_hf_api`` support it.
"""

try:
    import fms
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "smolstack.interop.fms needs the Foundation Model Stack, which is not installed "
        "(pip install 'smolstack[fms]', on Python 3.11 or 3.12)",
        name="fms",
    ) from error

from smolstack.interop.fms.config import Idefics3Config, to_fms_config, to_smolstack_config
from smolstack.interop.fms.conversion import from_smolstack, hf_state_dict, to_smolstack
from smolstack.interop.fms.inputs import generation_inputs
from smolstack.interop.fms.model import Idefics3
from smolstack.interop.fms.registration import register

register()

__all__ = [
    "Idefics3",
    "Idefics3Config",
    "from_smolstack",
    "generation_inputs",
    "hf_state_dict",
    "register",
    "to_fms_config",
    "to_smolstack",
    "to_smolstack_config",
]
del fms
