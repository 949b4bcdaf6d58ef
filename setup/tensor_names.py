"""Names of tensors in weights from elsewhere: upstream, dreamerv3-torch, and earlier versions of this code."""

import re

# Pattern and replacement, applied in order. Upstream is a fork of dreamerv3-torch and shares its names.
UPSTREAM = [
    (r"_orig_mod\.", ""),
    (r"^_wm\.encoder\.", "world_model.representation.encoder."),
    (r"^_wm\.MBR\.target_encoder\.", "world_model.representation.raw_encoder."),
    (r"^_wm\.dynamics\._cont_feat_layers\.0\.", "world_model.representation.projector."),
    (r"^_wm\.target_dynamics\._cont_feat_layers\.0\.", "world_model.representation.raw_projector."),
    (r"^_wm\.dynamics\.", "world_model.representation.dynamics."),
    (r"^_wm\.target_dynamics\.", "world_model.representation.raw_dynamics."),
    (r"^_wm\.heads\.decoder\.prj\.w\.", "world_model.representation.projector."),
    (r"^_wm\.heads\.decoder\._mlp\.mean_layer\.", "world_model.representation.decoder.out."),
    (r"^_wm\.heads\.decoder\.", "world_model.representation.decoder."),
    (r"^_wm\.heads\.(reward|cont)\.", r"world_model.\1_head."),
    (r"^_task_behavior\.(?=actor|value|_slow_value)", "actor_critic."),
    (r"^_expl_behavior\._behavior\.(?=actor|value|_slow_value)", "explorer.behavior."),
    (r"^_expl_behavior\._networks\.", "explorer.ensemble."),
    (r"\._slow_value\.", ".slow_critic."),
    (r"\.value\.", ".critic."),
    (r"\._cnn\._linear_layer\.", ".cnn.linear."),
    (r"\._cnn\.", ".cnn."),
    (r"\._mlp\.layers\.", ".mlp."),
    (r"\.W$", ".initial_deter"),
    (r"\._inp_layers\.", ".input."),
    (r"\._cell\._layer\.", ".cell.linear."),
    (r"\._cell\._norm\.", ".cell.norm."),
    (r"\._img_out_layers\.", ".prior_hidden."),
    (r"\._ims_stat_layer\.", ".prior_head."),
    (r"\._obs_out_layers\.", ".post_hidden."),
    (r"\._obs_stat_layer\.", ".post_head."),
    (r"\._pre_layers\.", ".layers."),
    (r"\.(mean_layer|_dist_layer)\.", ".out."),
]
EARLIER = [
    (r"^world_model\.hybrid\.(raw_)?rssm\.projector\.", r"world_model.representation.\1projector."),
    (r"^world_model\.hybrid\.(raw_)?rssm\.", r"world_model.representation.\1dynamics."),
    (r"^world_model\.hybrid\.", "world_model.representation."),
    (r"^probe\.decoder\.cnn\.image\.", "probe.decoder.cnn."),
]


def rename(state: dict, rules: list[tuple[str, str]]) -> dict:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def upstream_names(state: dict) -> dict:
    """Tensors of an upstream or dreamerv3-torch state dict under our names; those repeated under other names go."""
    return {key: value for key, value in rename(state, UPSTREAM).items() if not key.startswith("_")}


def current_names(state: dict) -> dict:
    """A state dict of this code as it is named today, whichever version wrote it."""
    return rename(state, EARLIER)
