"""All faults that the suite must notice."""

import faults_ends
import faults_model
import faults_plan
import faults_runs
from mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = (*faults_ends.FAULTS, *faults_model.FAULTS, *faults_runs.FAULTS, *faults_plan.FAULTS)
