"""Raw Cityscapes or CamVid -> the processed folder that training reads; see unetseg/tools/preprocess.py.

python preprocessing/image_segmentation_preprocessing.py --data_dir RAW --output_dir PROCESSED
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from unetseg.__main__ import main

    sys.exit(main(["preprocess", *sys.argv[1:]]))
