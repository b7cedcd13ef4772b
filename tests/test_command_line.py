"""The command line as a user meets it: every message read, and the commands that matter run for real."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from omegaconf import DictConfig

from ablab.errors import ConfigError
from ablab.lab.config.errors import readable_errors
from ablab.lab.train import train

Command = Callable[..., "subprocess.CompletedProcess[str]"]

# What is typed, and how the answer begins. The folder that it is typed in has an empty folder `nothing`, an empty file
# `empty.txt` and a file `short.txt` of a few words.
REFUSED = [
    # not of the form key=value
    ("norm groupnorm", "norm: not of the form key=value; leave no space around the ="),
    ("norm: groupnorm", "norm:: not of the form key=value; leave no space around the ="),
    ("norm =groupnorm", "norm: not of the form key=value; leave no space around the ="),
    ("data.batch_size:8", "data.batch_size:8: not of the form key=value; leave no space around the ="),
    ("data.batch_size=[1", "data.batch_size=[1: not of the form key=value ("),
    ("norm==groupnorm", "norm==groupnorm: not of the form key=value ("),
    ("output_dir=~/runs", "output_dir=~/runs: not of the form key=value ("),
    ("data.batch_size=8, 16", "data.batch_size=8,: its list ends with a comma; leave no space behind one, key=1,2"),
    # a choice that there is not
    ("norm=gruopnorm", "norm=gruopnorm: there is no such choice; did you mean groupnorm? norm has: "),
    ("norm=GroupNorm", "norm=GroupNorm: there is no such choice; did you mean groupnorm? norm has: "),
    ("norm=", "norm=: there is no such choice; norm has: "),
    (
        "norm/weight=weightnorm",
        "norm/weight=weightnorm: there is no such choice; did you mean weight_norm? norm/weight",
    ),
    ("data/augment=cropflip", "data/augment=cropflip: there is no such choice; did you mean crop_flip? data/augment"),
    ("model=resnet19", "model=resnet19: there is no such choice; did you mean resnet18? model has: "),
    ("data=mnist5", "data=mnist5: there is no such choice; did you mean mnist5k? data has: "),
    ("experiment=char_lsmt", "experiment=char_lsmt: there is no such choice; did you mean char_lstm? experiment has: "),
    (
        "trainer=tpu",
        "trainer=tpu: there is no such choice; did you mean gpu? trainer has: ",
    ),
    ("callbacks=early_stop", "callbacks=early_stop: there is no such choice; did you mean early_stopping? callbacks"),
    ("logger=comet", "logger=comet: there is no such choice; logger has: "),
    ("hydra/launcher=joblib", "hydra/launcher=joblib: there is no such choice; hydra/launcher has: basic"),
    ("model=transformer model/qk_norm=batchnorm", "model/qk_norm=batchnorm: there is no such choice; model/qk_norm"),
    # a group that is given something else than one choice
    ("model=null", "model=null: a group takes the name of a choice; python train.py --help shows them"),
    ("optimizer=0.1", "optimizer=0.1: a group takes the name of a choice; python train.py --help shows them"),
    ("norm=[batchnorm,groupnorm]", "norm/weight: a group has been given two choices; give one"),
    (
        "norm=batchnorm,groupnorm",
        "norm=batchnorm,groupnorm: several values are a sweep; add -m to run each, or give one",
    ),
    ("experiment=char_lstm,none", "experiment=char_lstm,none: several values are a sweep; "),
    ("optimizer.lr=0,1", "optimizer.lr=0,1: several values are a sweep; add -m to run each, or give one"),
    ("norm.weight=weight_norm", "norm.weight=weight_norm: a choice is made with a slash, norm/weight=…; did you mean"),
    ("data.augment=crop_flip", "data.augment=crop_flip: a choice is made with a slash, data/augment=…; did you mean"),
    ("data.shift=5", "data.shift=5: a choice is made with a slash, data/shift=…; shift has: brightness, "),
    (
        "data=digits_rows scale=gpu",
        "scale=gpu: it sets data/augment, which nothing that is chosen has; leave it out",
    ),
    ("model/qk_norm=layernorm", "model/qk_norm=layernorm: nothing that is chosen has a qk_norm; leave it out"),
    ("data=_base/any", "data: it names no class to build; choose another, data has: "),
    ("data=_base/images", "data/_base/images: it builds upon data/labelled, which is not there; choose another"),
    # + and ++ and ~
    ("+norm=groupnorm", "+norm=groupnorm: one is chosen already; leave the + out, norm=groupnorm"),
    ("++norm=groupnorm", "++norm=groupnorm: a choice needs no ++; leave it out, norm=groupnorm"),
    ("+seed=1", "+seed=1: there is one already; leave the + out, seed=1"),
    ("+sed=1", "sed: there is no such key; did you mean seed? the top level has: ablation, callbacks, "),
    ("+norm.num_groups=3", "norm.num_groups: BatchNorm takes no such argument; "),
    ("+model.num_classes=5", "model.num_classes: the program itself gives it, from the rest of the config; leave it"),
    ("+monitor.patience=3", "monitor.patience: there is no such key; monitor has: metric, mode"),
    ("+trainer.gpus=1", "trainer.gpus: Trainer takes no such argument; Trainer has: accelerator, "),
    ("~norm", "norm: it is missing; a run needs one, so leave the ~norm out"),
    ("~seed", "seed: it is missing; a run needs one, so leave the ~seed out"),
    ("~nope", "~nope: it is not set; leave it out"),
    ("~norm=groupnorm", "~norm=groupnorm: it is not what is chosen; leave it out"),
    ("~trainer.max_epochs", "trainer.max_epochs: it is missing; a run needs one, so leave the ~trainer.max_epochs out"),
    # a key that there is not, in each place
    ("sed=1", "sed: there is no such key; did you mean seed? the top level has: ablation, callbacks, "),
    ("nrom=groupnorm", "nrom: there is no such key; did you mean norm? the top level has: "),
    ("norm/wieght=weight_norm", "norm/wieght: there is no such key; did you mean norm/weight? the top level has: "),
    ("lr=0.1", "lr: there is no such key; did you mean optimizer.lr? the top level has: "),
    ("batch_size=8", "batch_size: there is no such key; did you mean data.batch_size? the top level has: "),
    (
        "data.batchsize=8",
        "data.batchsize: there is no such key; did you mean batch_size? data has: augment, batch_size, ",
    ),
    ("norm.momentun=1", "norm.momentun: there is no such key; did you mean momentum? norm has: affine, d_max, eps, "),
    (
        "norm=groupnorm norm.num_group=4",
        "norm.num_group: there is no such key; did you mean num_groups? norm has: affine, eps, group_size, "
        "image_scope, num_groups, sequence_scope, weight\n",
    ),
    ("norm.weight.eps=1", "norm.weight.eps: there is no such key; norm.weight has none"),
    ("seed.x=1", "seed.x: there is no such key; seed has none"),
    ("trainer.epochs=3", "trainer.epochs: there is no such key; did you mean max_epochs? trainer has: accelerator, "),
    ("callbacks.checkpoint.keep=3", "callbacks.checkpoint: there is no such key; did you mean checkpoints? callbacks"),
    ("logger=csv logger.wandb.project=x", "logger.wandb.project: there is no such key; logger.wandb has none"),
    ("hydra.nope=1", "hydra.nope: there is no such key; hydra has: "),
    # ${…} and _target_
    ("'name=${nope}'", "name: what its ${…} stands for is not there (Interpolation key 'nope' not found); give"),
    ("'name=${oc.env:NOPE}'", "name: what its ${…} stands for is not there ("),
    ("'seed=${name}'", "seed=run: a whole number is needed"),
    (
        "norm._target_=ablab.norms.GrupNorm",
        "norm._target_=ablab.norms.GrupNorm: there is no class or function GrupNorm",
    ),
    ("norm._target_=no.such.Norm", "norm._target_=no.such.Norm: there is no class or function Norm in no.such; give"),
    ("norm._target_=null", "norm._target_=null: a class or function is needed, package.module.Name"),
    (
        "~trainer._target_",
        "trainer: it names no class to build; choose another, trainer has: ",
    ),
    ("optimizer._target_=torch.optim.Adam", "optimizer.momentum: Adam takes no such argument; Adam has: amsgrad, "),
    (
        "+callbacks.es._target_=lightning.pytorch.callbacks.EarlyStopping +callbacks.es.monitor=train/foo",
        "callbacks.es.monitor=train/foo: Classification has: val/accuracy, ",
    ),
    (
        "+callbacks.a={_target_:lightning.pytorch.callbacks.GradientAccumulationScheduler,scheduling:{0:2}}",
        "callbacks.a: data.batch_size is the batch of a step, and its gradients begin anew in each; trainer.acc",
    ),
    ("+callbacks.mine=EarlyStopping", "callbacks.mine=EarlyStopping: an entry with a _target_ is needed, or null to"),
    # a value of another type
    ("seed=1e3", "seed=1000.0: a whole number is needed"),
    ("seed=1.5", "seed=1.5: a whole number is needed"),
    ("seed=", "seed=: a whole number is needed"),
    ("name=3", "name=3: a text is needed"),
    ("output_dir=null", "output_dir=null: a text is needed"),
    ("data.batch_size=abc", "data.batch_size=abc: a whole number or full is needed"),
    ("data.batch_size=8.0", "data.batch_size=8.0: a whole number or full is needed"),
    ("data.batch_size=true", "data.batch_size=true: a whole number or full is needed"),
    ("data.batch_size=null", "data.batch_size=null: a whole number or full is needed"),
    ("data.val_fraction=20%", "data.val_fraction=20%: a number is needed"),
    ("data.augment.flip=yes", "data.augment.flip=yes: none or random or alternating is needed"),
    ("model.zero_init_residual=1", "model.zero_init_residual=1: true or false is needed"),
    ("model=rnn model.cell=lstn", "model.cell=lstn: elman or gru or lstm is needed"),
    ("norm=groupnorm norm.image_scope=pixel", "norm.image_scope=pixel: sample or position is needed"),
    ("norm.eps=nan", "norm.eps=nan: a number is needed"),
    ("optimizer.lr=abc", "optimizer.lr=abc: a number is needed"),
    ("optimizer.lr=[0.1]", "optimizer.lr=[0.1]: a number is needed"),
    ("optimizer.lr=true", "optimizer.lr=true: a number is needed"),
    ("optimizer=adam optimizer.betas=0.9", "optimizer.betas=0.9: a list of 2 (a number, a number) is needed"),
    ("optimizer=adam optimizer.betas=[0.9]", "optimizer.betas=[0.9]: a list of 2 (a number, a number) is needed"),
    ("scheduler.warmup_steps=0.1", "scheduler.warmup_steps=0.1: a whole number is needed"),
    ("scheduler=multistep scheduler.milestones=0.5", "scheduler.milestones=0.5: a list, each item a number is needed"),
    ("trainer.max_epochs=many", "trainer.max_epochs=many: a whole number or null is needed"),
    ("trainer.deterministic=maybe", "trainer.deterministic=maybe: true or false or warn or null is needed"),
    ("trainer.precision=fp16", "trainer.precision=fp16: 64 or 32 or 16 or transformer-engine or "),
    ("monitor=val/loss", "monitor=val/loss: it has the keys metric, mode; set "),
    ("callbacks.nonfinite=3", "callbacks.nonfinite=3: an entry with a _target_ is needed, or null to leave it out"),
    ("logger.wandb=offline", "logger.wandb=offline: an entry with a _target_ is needed, or null to leave it out"),
    ("logger.wandb.mode=on", "logger.wandb.mode=on: auto or online or offline is needed"),
    # a value that makes no sense
    ("seed=-1", "seed: -1 is not in bounds"),
    ("data.seed=-1 data.split_seed=0", "data.seed=-1: a seed is 0 or more, and below 4294967296"),
    ("data.batch_size=0", "data.batch_size=0: a batch has at least one sample"),
    ("data.batch_size=5000", "data.batch_size=5000 is more than the 1149 training samples; choose a smaller one"),
    ("data.micro_batch_size=0", "data.micro_batch_size=0: a forward pass has at least one sample"),
    ("data.val_fraction=0.999", "data.val_fraction=0.999: both parts of 1437 different samples need each of the 10"),
    ("data.fold=1", "data.fold=1: say of how many, for example data.folds=5"),
    ("data.folds=1", "data.folds=1: at least 2 are needed"),
    ("data.folds=5 data.fold=5", "data.fold=5: the 5 folds have the numbers 0 to 4"),
    ("data.folds=2000", "data.folds=2000: class 8 has only 139 different training samples; choose fewer folds"),
    ("data.classes_per_batch=3", "data.classes_per_batch=3: it does not divide batch_size=32 into equal parts"),
    ("data.augment.mixup=-1", "data.augment.mixup=-1: 0 (off) or more is needed"),
    ("data.augment.cutout=8", "data.augment.cutout=8: images of 8x8 are no larger; choose less"),
    ("data.augment.crop_padding=8", "data.augment.crop_padding=8: images of 8x8 have fewer pixels to pad with"),
    ("data/shift=contrast data.shift.severity=6", "data.shift.severity=6: a whole number from 1 to 5 is needed"),
    ("data/shift=contrast data.shift.seed=-1", "data.shift.seed=-1: a whole number from 0 to 4294967295 is needed"),
    ("data=synthetic_images data.num_classes=1", "data: the data have one class, 0; "),
    ("data=synthetic_images data.num_samples=5", "data: no training sample has the class 5, 6, 7, 8, 9; give some"),
    (
        "model.depth=21",
        "model.depth=21: a CIFAR-style ResNet has depth 6n + 2 (8, 14, 20, 26, 32, …); the nearest is 20",
    ),
    ("model.width=1000000", "model: it takes more memory than there is; choose smaller sizes"),
    ("model=rnn model.dropout=1", "model.dropout=1: a probability is needed, at least 0 and below 1"),
    ("model=transformer model.num_heads=0", "model.num_heads=0: at least 1 is needed"),
    ("model=transformer model.num_heads=3", "model.embed_dim=64 is not a multiple of num_heads=3"),
    ("model=transformer model.mlp_ratio=inf", "model.mlp_ratio=inf: the perceptron of a block needs at least one"),
    ("norm.momentum=2", "norm.momentum=2: a share of the newest batch is needed, more than 0 and at most 1"),
    ("optimizer.lr=-0.1", "optimizer.lr=-0.1: a number is needed that is finite and not negative"),
    ("optimizer.momentum=1.5", "optimizer.momentum=1.5: a share of the past is kept, at least 0 and below 1"),
    (
        "optimizer.momentum=0",
        "optimizer.momentum=0, nesterov=true: Nesterov's is a momentum; set optimizer.nesterov=false",
    ),
    ("optimizer=adam optimizer.betas=[1,0.9]", "optimizer.betas=[1, 0.9]: a share of the past is kept, at least 0 and"),
    ("scheduler.warmup_steps=-1", "scheduler.warmup_steps=-1: steps cannot be negative; 0 is no warmup"),
    (
        "scheduler=multistep scheduler.milestones=[100]",
        "scheduler.milestones=[100]: they are shares of the run, between",
    ),
    (
        "scheduler=one_cycle scheduler.base_momentum=0.95",
        "scheduler.base_momentum=0.95: it is reached from the optimizer's own momentum, 0.9, and is at most that",
    ),
    ("task.label_smoothing=1", "task.label_smoothing=1: a share of the target is needed, at least 0, below 1"),
    ("monitor.metric=val/acc", "monitor.metric=val/acc: did you mean val/accuracy? Classification has: val/accuracy, "),
    ("monitor.metric=val/loss", "monitor.mode=max: it would keep the worst val/loss; set monitor.mode=min"),
    ("callbacks.checkpoints.monitor=val/acc", "callbacks.checkpoints.monitor=val/acc: did you mean val/accuracy? "),
    ("callbacks.checkpoints.mode=min", "callbacks.checkpoints.mode: of val/accuracy it is max; set callbacks."),
    ("callbacks.checkpoints.keep=0", "callbacks.checkpoints.keep=0: a run that is to be resumed needs at least one"),
    ("callbacks.nonfinite.skip=-1", "callbacks.nonfinite.skip=-1: 0 or more steps can be left out"),
    (
        "callbacks=ema callbacks.ema.update_every_n_steps=0",
        "callbacks.ema.update_every_n_steps=0: at least 1 is needed",
    ),
    ("logger.wandb.init_timeout=0", "logger.wandb.init_timeout=0: it is a number of seconds, and greater than 0"),
    ("name=../elsewhere", "name='../elsewhere': it names a folder in output_dir, and is a word, not a path"),
    # a trainer that cannot be, or not on this machine
    ("trainer.max_steps=0", "trainer.max_steps=0: at least 1 is needed, or -1 for no limit"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0: at least 1 is needed, or -1 for no limit"),
    ("trainer.max_epochs=-1", "trainer.max_epochs=-1, trainer.max_steps=-1: a schedule needs an end; set one of them"),
    ("trainer.max_epochs=null", "trainer.max_epochs=null: set an integer, or -1 together with trainer.max_steps"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: a norm above 0 is needed, or null for no limit"),
    ("trainer.gradient_clip_val=inf", "trainer.gradient_clip_val=inf: a norm above 0 is needed, or null for no limit"),
    ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0: at least 1 is needed"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0: at least 1 is needed"),
    (
        "trainer.check_val_every_n_epoch=null",
        "trainer.check_val_every_n_epoch=null: trainer.val_check_interval=1.0 then",
    ),
    ("trainer.val_check_interval=0", "trainer.val_check_interval=0: more than 0 is needed"),
    ("trainer.val_check_interval=nan", "trainer.val_check_interval=nan: a whole number or a number or a text or dict"),
    ("trainer.num_sanity_val_steps=-2", "trainer.num_sanity_val_steps=-2: 0 or more, or -1 for all"),
    ("trainer.val_check_interval=often", "trainer.val_check_interval=often: a number of batches is needed, or a share"),
    ("trainer.val_check_interval=1.5", "trainer.val_check_interval=1.5: a share is at most 1.0; a whole number counts"),
    ("trainer.val_check_interval=1000", "trainer.val_check_interval=1000: an epoch has 35 batches; choose fewer, or "),
    ("trainer.limit_test_batches=0", "trainer.limit_test_batches=0: more than 0 is needed"),
    ("trainer.limit_test_batches=0.01", "trainer.limit_test_batches=0.01: that is less than one of 12 batches; give a"),
    ("trainer.precision=16-mixed", "trainer.precision=16-mixed: it is for GPUs; choose bf16-mixed or 32-true"),
    ("trainer.precision=transformer-engine", "trainer: it needs a package that is not installed (Requirement "),
    ("trainer.accelerator=tpu", "trainer.accelerator=tpu: this machine has none, or torch cannot see it; choose "),
    ("trainer.accelerator=gpux", "trainer.accelerator=gpux: there is no such accelerator; did you mean gpu? lightning"),
    ("trainer.accelerator=null", "trainer.accelerator=null: there is no such accelerator; "),
    ("trainer.devices=0", "trainer.devices=0: a number of processes is needed, at least 1"),
    ("trainer.devices=-1", "trainer.devices=-1: a number of processes is needed, at least 1"),
    ("trainer.devices=3 trainer.strategy=ddp", "data.batch_size=32: it is the global"),
    ("trainer.num_nodes=0", "trainer.num_nodes=0: at least 1 machine is needed"),
    (
        "trainer.strategy=ddpp",
        "trainer.strategy=ddpp: there is no such strategy; did you mean ddp? lightning has: auto, ",
    ),
    ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: what its processes find"),
    ("+trainer.sync_batchnorm=true", "trainer.sync_batchnorm=true: it converts torch's own layers"),
    ("+trainer.use_distributed_sampler=true", "trainer.use_distributed_sampler: the program itself gives it"),
    # what does not go together
    (
        "model=resnet data=digits_rows",
        "model: ResNet is for images, and DigitsRows gives sequences; choose data=",
    ),
    ("task=language_modeling", "task: LanguageModeling does not go with Digits, which gives class_names; leave task="),
    ("data/shift=time_warp", "data: shift: TimeWarp is for sequences, and Digits gives images; choose another"),
    ("model=rnn data/augment=crop_flip", "data/augment=crop_flip: nothing that is chosen has a augment; leave it out"),
    (
        "model=rnn data=text model.bidirectional=true",
        "model.bidirectional=true: a network that predicts the next token",
    ),
    ("experiment=char_lstm model=resnet", "model.hidden_size: ResNet takes no such argument; ResNet has: depth, "),
    (
        "norm=groupnorm norm.num_groups=32",
        "norm: num_groups=32 does not divide 16 features; divisors are 1 2 4 8 16; set norm.num_groups=16 (at ",
    ),
    ("norm=groupnorm norm.group_size=4", "norm.num_groups=8, group_size=4: give one of them and set the other to null"),
    ("model=rnn norm=instancenorm", "norm: inside a recurrence, where a step stands alone, the mean and variance "),
    (
        "model=transformer data=text norm=batchnorm",
        "norm: a mean and variance over the batch and all positions would leak the future into a causal model; choose "
        "a norm whose statistics stay within a step (at blocks.0.norm1, blocks.0.norm2, blocks.1.norm1, "
        "blocks.1.norm2, norm of the model)\nnorm: defined everywhere in this model, as they are: ",
    ),
    (
        "model=resnet18 norm=instancenorm",
        "norm: an input of shape (32, 128, 1, 1) leaves a single value for each mean and variance over all positions",
    ),
    (
        "model=transformer norm/weight=weight_standardization",
        "norm: norm/weight: weight standardization is for convolutions, and this model has none; choose ",
    ),
    (
        "model=transformer model/qk_norm=layernorm model.num_heads=64",
        "norm: the mean and variance of each feature would be taken over a single value, and the output would not "
        "depend on how large it is; choose a norm over several features or over the batch (at blocks.0.attention.norm_",
    ),
    # files that are not there, or not what is needed
    ("data=cifar10 data.root=/no/such", "data.root=/no/such: there is no such folder; give one with the parquet"),
    ("data=cifar10 data.root=nothing", "data.root=nothing: no test.parquet or test-*.parquet there; give the folder"),
    ("data=hf_image", "data.name=null, root=null: say which data set of the Hub, or give a folder"),
    ("data=hf_image data.name=", "data.name=null, root=null: say which data set of the Hub, or give a folder"),
    ("data=imagefolder", "data.root: it has no default; give one, data.root=…"),
    (
        "data=imagefolder data.root=short.txt",
        "data.root=short.txt: it is a file; give one with a folder for each class",
    ),
    (
        "data=imagefolder data.root=nothing",
        "data.root=nothing: there are no folders in it; it needs one for each class",
    ),
    ("model=rnn data=text data.path=/no/such", "data.path=/no/such: there is no such file or folder; give a"),
    ("model=rnn data=text data.path=", "data.path=: it is empty; give a file or a folder, or null for Python's own"),
    ("model=rnn data=text data.path=nothing", "data.path=nothing: the folder is empty; give one that has UTF-8 text"),
    ("model=rnn data=text data.path=short.txt", "data.path=short.txt: the text has 11 tokens, and its parts ("),
    ("model=rnn data=text data.context_length=1000000", "data.path=null: the text has "),
    (
        "model=rnn data=timeseries",
        "data.test_file: it has no default; give one, data.test_file=…\ndata.train_file: it has no default; give one, ",
    ),
    (
        "model=rnn data=timeseries data.train_file=empty.txt data.test_file=empty.txt",
        "data.train_file=empty.txt: there is no series in it; is it a .ts file, and whole?",
    ),
    ("output_dir=/proc/runs", "output_dir=/proc/runs: no folder can be made there (No such file or directory)"),
    ("output_dir=short.txt", "output_dir=short.txt: no folder can be made there (Not a directory)"),
]

# Each kind of answer from the real program: before it composes, while it does, before torch is loaded, and after.
FROM_THE_PROGRAM = [
    (["norm: groupnorm"], "error: norm: groupnorm: not of the form key=value; leave no space around the ="),
    (["norm=gruopnorm"], "error: norm=gruopnorm: there is no such choice; did you mean groupnorm? norm has: "),
    (["model=null"], "error: model=null: a group takes the name of a choice; "),
    (["sed=1"], "error: sed: there is no such key; did you mean seed? the top level has: "),
    (["data.batch_size=abc"], "error: data.batch_size=abc: a whole number or full is needed"),
    (["data.batch_size=0"], "error: data.batch_size=0: a batch has at least one sample"),
    (["--norm", "groupnorm"], "error: what is set takes no dashes: norm=groupnorm data.batch_size=8"),
    (["--cfg", "job", "-p", "nrom"], "error: --package nrom: there is no such part; did you mean norm? the config has"),
    (["-sc", "install=csh"], "error: No completion plugin for 'csh' found"),
    (["-m", "norm=batchnorm,gruopnorm"], "error: norm=gruopnorm: there is no such choice; did you mean groupnorm?"),
    (["-m", "seed=0,", "norm=none"], "error: seed=0,: its list ends with a comma; leave no space behind one, key=1,2"),
    (["resume=nowhere"], "error: resume=nowhere: it is not a run's folder; there is no run.json in it"),
    (["-m", "data.batch_size=0"], "error: data.batch_size=0: a batch has at least one sample"),
    (["-m", "data.batch_size=8,0"], "error: data.batch_size=0: a batch has at least one sample"),
    (["-m", "seed=range(0)"], "error: ablation.seeds=[]: at least one seed is needed, and each once"),
    (["ablation=norm_batch_siz"], "error: ablation=norm_batch_siz: there is no such choice; did you mean norm_batch_s"),
]


@pytest.fixture
def answer(
    config: Callable[..., DictConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """What a command line that must be refused is answered, in this process: importing takes longer than refusing."""
    place = tmp_path / "place"
    (place / "nothing").mkdir(parents=True)
    (place / "empty.txt").touch()
    (place / "short.txt").write_text("a few words")
    before = sorted(place.rglob("*"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(L.Trainer, "fit", lambda *arguments, **settings: pytest.fail("training has started"))

    def find(line: str) -> str:
        with pytest.raises(SystemExit) as left, readable_errors():
            train(config(*shlex.split(line)))
        assert left.value.code == 2
        assert sorted(place.rglob("*")) == before, "a refused command leaves nothing behind"
        return capsys.readouterr().err

    return find


def test_at_least_sixty_malformed_command_lines_are_tried() -> None:
    assert len({line for line, _ in REFUSED}) == len(REFUSED) >= 60


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_malformed_command_line_is_refused_with_the_place_the_value_and_the_remedy(
    answer: Callable[..., str], line: str, message: str
) -> None:
    said = answer(line)
    assert said.startswith(f"error: {message}"), said
    assert said.count("error: ") == 1


@pytest.mark.parametrize(("words", "message"), FROM_THE_PROGRAM, ids=[" ".join(words) for words, _ in FROM_THE_PROGRAM])
def test_the_program_refuses_with_one_message_and_exit_code_2(
    command: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    result = command(*words)
    assert result.returncode == 2, result.stderr
    [said] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith(message), result.stderr
    assert "Traceback" not in result.stderr
    assert "Error executing job" not in result.stderr
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_a_guard_within_another_speaks_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, readable_errors(), readable_errors():
        raise ConfigError("name=: give one")
    assert (left.value.code, capsys.readouterr().err) == (2, "error: name=: give one\n")


def test_an_exit_that_is_not_hydras_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def show_cfg() -> None:  # called as the function of Hydra that knows no such part
        raise SystemExit(1)

    with pytest.raises(SystemExit) as left, readable_errors():
        show_cfg()
    assert (left.value.code, capsys.readouterr().err) == (1, "")


def test_a_run_that_is_short_may_end_within_its_warmup(run: Callable[..., object]) -> None:
    run("trainer.max_steps=1", "scheduler.warmup_steps=20")


def named(text: str, before: str, after: str, separator: str) -> set[str]:
    """What a text lists between two others."""
    [found] = re.findall(f"{re.escape(before)}(.*?){re.escape(after)}", text)
    return set(found.split(separator))


def test_the_norms_that_would_fit_are_those_that_do(answer: Callable[..., str]) -> None:
    said = answer("model=transformer norm=groupnorm_weightstandardization")
    fitting = named(said, "norm: defined everywhere in this model, as they are: ", "\n", ", ")
    assert fitting >= {"batchnorm", "batchnorm_weightnorm", "dyt", "layernorm", "none"}
    assert "groupnorm_weightstandardization" not in fitting


def test_the_data_and_models_that_would_go_together_are_those_that_do(answer: Callable[..., str]) -> None:
    said = answer("model=resnet data=digits_rows")
    data, models = named(said, "choose data=", " for this model", "|"), named(said, "or model=", " for this data", "|")
    assert data >= {"cifar10", "cifar100", "digits", "hf_image", "imagefolder", "mnist5k", "synthetic_images"}
    assert not data & {"digits_rows", "japanese_vowels", "text", "synthetic_text"}
    assert models >= {"rnn", "transformer"}
    assert not models & {"resnet", "resnet18", "resnet50", "airbench"}


@pytest.mark.slow
def test_a_synchronized_batch_of_two_processes_is_counted_whole(command: Command) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2", "logger=csv")
    steps = ("trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
    assert command("model=rnn", "norm=batchnorm", *two, *steps).returncode == 2  # one value on each process
    result = command("model=rnn", "norm=syncbatchnorm", *two, *steps)
    assert result.returncode == 0, result.stderr


def test_a_typo_in_an_experiment_file_is_found(command: Command, tmp_path: Path) -> None:
    extra = tmp_path / "more"
    (extra / "experiment").mkdir(parents=True)
    (extra / "experiment" / "mine.yaml").write_text("# @package _global_\nsed: 1\ntrainer: {max_epoch: 2}\n")
    result = command("experiment=mine", f"hydra.searchpath=[file://{extra}]")
    assert result.returncode == 2
    assert "sed: there is no such key; did you mean seed?" in result.stderr
    assert "trainer.max_epoch: Trainer takes no such argument; did you mean max_epochs?" in result.stderr


def test_a_traceback_can_be_asked_for(command: Command) -> None:
    result = command("data.batch_size=0", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "data.batch_size=0: a batch has at least one sample" in result.stderr


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["norm=gruopnorm"], ["data.batch_size=abc"]])
def test_torch_is_not_loaded_to_help_or_to_refuse(command: Command, words: list[str]) -> None:
    result = command(*words, PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in loaded
    assert not {"torch", "lightning", "wandb", "sklearn"} & loaded
