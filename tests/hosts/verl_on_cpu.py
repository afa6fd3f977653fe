"""Lets verl run without an accelerator; imported before anything of verl asks what the machine has."""

import transformers
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


class OnCPU(PlatformCUDA):
    """verl has no platform for such a machine."""

    device_name = "cpu"

    def current_device(self):
        return "cpu"

    def communication_backend_name(self):
        return "gloo"


set_platform(OnCPU())
transformers.utils.logging.disable_progress_bar()
