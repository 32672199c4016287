# `make` alone explains itself. Every target works first on a fresh clone: the environment is made when needed.
PYTHON ?= python3
JOBS ?=
PY := .venv/bin/python
PICTURES := sporco==0.2.2.post1 mahotas==1.4.19 scikit-learn==1.7.2

.PHONY: help all quick test lesson report figures bench restore train clean

help:
	@echo "make all      compute every experiment, figure and REPORT.md (an hour and a half on 2 cores;"
	@echo "              interrupt it when you like: the next 'make all' goes on; a second one does nothing)"
	@echo "              REUSE=1 trusts the records in out/ whose code and settings have not changed"
	@echo "make quick    the same road on tiny budgets, into out-quick/ (minutes; its numbers mean nothing)"
	@echo "make test     prove that the mathematics is right"
	@echo "make lesson   draw both mechanisms, and the law of combination, beside their exact answers (a minute)"
	@echo "make report   render REPORT.md, out/TABLES.md and the table of README.md from the records in out/, without computing"
	@echo "make figures  draw the figures again from the jobs in .cache/"
	@echo "make bench    where the time goes on this machine; written to README.md and out/bench.json (minutes;"
	@echo "              LONG=1 adds fits to equal PSNR and the restoration of a larger photo: more than an hour)"
	@echo "make restore IMAGE=photo.jpg TASK=denoise|inpaint|superres [SIGMA=25] [MASK=mask.png] [FACTOR=2]"
	@echo "             [METHOD=auto] [SAMPLES=4] [OUT=result.png]     restore a photo of yours;"
	@echo "             a METHOD that does not exist is answered with the list of those that do"
	@echo "make train IMAGES=folder [TRAIN_STEPS=5000] [OUT=samples.png]     a diffusion model of your own images;"
	@echo "             then 'make restore … METHOD=diffusion IMAGES=folder' uses it"
	@echo "make clean    forget the cache and the quick results (out/ stays)"
	@echo "Variables: PYTHON=$(PYTHON) (3.10 to 3.13), JOBS=number of processes (default: one per core)"

.venv/ready: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# Only the photographs inside these three are read, so what the packages need is left out.
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps $(PICTURES)
	@touch $@

all: .venv/ready
	$(PY) experiments.py all jobs=$(JOBS) reuse=$(REUSE)

quick: .venv/ready
	$(PY) experiments.py all scale=quick jobs=$(JOBS)

test: .venv/ready
	$(PY) -m pytest -q tests

lesson: .venv/ready
	$(PY) experiments.py lesson

report: .venv/ready
	$(PY) experiments.py report

figures: .venv/ready
	$(PY) experiments.py figures

bench: .venv/ready
	$(PY) tests/bench.py $(if $(LONG),long)

# Values travel in the environment, so that spaces and quotes in file names stay what they are.
unexport IMAGE MASK OUT IMAGES
restore: export RESTORE_IMAGE := $(value IMAGE)
restore: export RESTORE_TASK := $(value TASK)
restore: export RESTORE_SIGMA := $(value SIGMA)
restore: export RESTORE_MASK := $(value MASK)
restore: export RESTORE_FACTOR := $(value FACTOR)
restore: export RESTORE_METHOD := $(value METHOD)
restore: export RESTORE_SAMPLES := $(value SAMPLES)
restore: export RESTORE_STEPS := $(value STEPS)
restore train: export RESTORE_TRAIN_STEPS := $(value TRAIN_STEPS)
restore train: export RESTORE_OUT := $(value OUT)
restore train: export RESTORE_IMAGES := $(value IMAGES)
restore: .venv/ready
	@$(PY) experiments.py restore image="$$RESTORE_IMAGE" task="$$RESTORE_TASK" sigma="$$RESTORE_SIGMA" \
	  mask="$$RESTORE_MASK" factor="$$RESTORE_FACTOR" method="$$RESTORE_METHOD" out="$$RESTORE_OUT" \
	  images="$$RESTORE_IMAGES" samples="$$RESTORE_SAMPLES" steps="$$RESTORE_STEPS" \
	  train_steps="$$RESTORE_TRAIN_STEPS"

train: .venv/ready
	@$(PY) experiments.py train images="$$RESTORE_IMAGES" out="$$RESTORE_OUT" \
	  train_steps="$$RESTORE_TRAIN_STEPS"

clean:
	rm -rf .cache out-quick .pytest_cache .hypothesis
