"""The U-Net of text-to-image models in plain Flax, its noise schedules, and diffusers' folders."""

from experiments.models.unet.config import UNetConfig as UNetConfig
from experiments.models.unet.model import UNet as UNet
from experiments.models.unet.names import diffusers_rules as diffusers_rules
from experiments.models.unet.pretrained import ImageModel as ImageModel
from experiments.models.unet.pretrained import save_unet as save_unet
from experiments.models.unet.pretrained import shapes_of as shapes_of
from experiments.models.unet.schedule import Predict as Predict
from experiments.models.unet.schedule import Schedule as Schedule
from experiments.models.unet.schedule import sampled as sampled
