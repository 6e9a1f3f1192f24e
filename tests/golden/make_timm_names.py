"""Makes timm_names.json: the names and shapes of ConvNeXtV2-Tiny's weights as timm itself has them.

pip install timm==1.0.31 torchvision && python tests/golden/make_timm_names.py > tests/golden/timm_names.json
"""

import json

import timm
import torch

if __name__ == "__main__":
    with torch.device("meta"):
        model = timm.create_model("convnextv2_tiny", pretrained=False)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    origin = {
        "package": f"timm {timm.__version__}, convnextv2_tiny (timm/models/convnext.py)",
        "made by": "tests/golden/make_timm_names.py",
    }
    # A line a tensor: short enough to be read.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(shapes[name])}" for name in shapes)
    print(json.dumps(origin, indent=1)[:-2] + ',\n "shapes": {\n' + lines + "\n }\n}")
