import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `from fixtures import …`: the models that these rooms share
