"""A checkpoint as a stock Llava: what transformers, vLLM and SGLang load with no code of ours.

Llava's projector is linear_1 -> activation -> linear_2. The linear adapter of LocVLM-B is written as linear_1, the
activation `linear` (which does nothing) and an identity matrix as linear_2: the logits are the same.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from locvlm.errors import CheckpointError
from locvlm.model.checkpoint import LoadedModel, image_processor
from locvlm.model.variants import LocVLM
from locvlm.prompts import IMAGE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PROJECTOR = "model.multi_modal_projector."

# the Vicuna v1 layout of locvlm.prompts.render_chat; the image stands first in the first user text
_CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='SYSTEM') -%}"
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.system = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- ns.system + ' ' if ns.system else '' -}}"
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] -%}"
    "{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' -}}"
    "{%- for part in parts if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{{- text + ' ' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'ASSISTANT: ' + text + '</s>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def export(loaded: LoadedModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `folder` in the llava-hf layout: weights in `dtype`, tokenizer, processor with the checkpoint's geometry,
    and a chat template in the words that the model was trained with.

    Logits of the stock class equal ours. Raises CheckpointError when the folder exists, or when stock processors cannot
    prepare the checkpoint's images (letterbox geometry).
    """
    geometry = loaded.config.geometry
    if geometry.kind.startswith("letterbox"):
        raise CheckpointError(
            f"exporting {loaded.path}: its geometry is letterbox, which no stock image processor expresses (the bars "
            "would be left out and every place be wrong); export a checkpoint of geometry squash or crop"
        )
    if folder.exists():
        raise CheckpointError(f"exporting into {folder}: it exists; give another folder or remove it")
    model = stock_model(loaded.model)
    text = loaded.model.config.text_config
    processor = LlavaProcessor(
        image_processor=image_processor(geometry),
        tokenizer=_beginning_with_bos(loaded.encoder.tokenizer),
        patch_size=loaded.config.model.vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        image_token=IMAGE,
        chat_template=_CHAT_TEMPLATE.replace(
            "SYSTEM", json.dumps(loaded.config.prompts.system)[1:-1].replace("'", "\\'")
        ),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.generation_config.update(
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            suppress_tokens=[loaded.encoder.image_id],  # its output row is never trained as a target
        )
        model.to(dtype).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def stock_model(model: LocVLM) -> LlavaForConditionalGeneration:
    """The same function as an instance of transformers' own class; it shares no memory with `model`."""
    values = model.config.to_dict()
    linear = values.pop("adapter_type") == "linear"
    for key in ("model_type", "architectures"):
        values.pop(key, None)
    if linear:
        values["projector_hidden_act"] = "linear"
    with no_init_weights():
        stock = LlavaForConditionalGeneration(LlavaConfig(**values))
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if linear:
        for name in ("weight", "bias"):
            weights[f"{_PROJECTOR}linear_1.{name}"] = weights.pop(f"{_PROJECTOR}linear.{name}")
        width = len(weights[f"{_PROJECTOR}linear_1.bias"])
        weights[f"{_PROJECTOR}linear_2.weight"] = torch.eye(width)
        weights[f"{_PROJECTOR}linear_2.bias"] = torch.zeros(width)
    stock.load_state_dict(weights, strict=True, assign=True)
    return stock.eval()


def _beginning_with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, made to put the begin token first as training did (`TextEncoder` does it by itself)."""
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer
