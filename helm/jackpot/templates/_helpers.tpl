{{/* Start of all names: at most 40 characters, so that the longest suffix fits into 63. */}}
{{- define "jackpot.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods. The launcher gives the pods of jobs the same ones, with their role as the component. */}}
{{- define "jackpot.selectorLabels" -}}
app.kubernetes.io/name: jackpot
app.kubernetes.io/instance: {{ .ctx.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Labels of an object. Arguments: ctx, component (optional). */}}
{{- define "jackpot.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .ctx.Chart.Name .ctx.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "jackpot.selectorLabels" . }}
app.kubernetes.io/version: {{ .ctx.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .ctx.Release.Service }}
app.kubernetes.io/part-of: jackpot
{{- with .ctx.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: without versions, so that an upgrade restarts only what has changed. */}}
{{- define "jackpot.podLabels" -}}
{{ include "jackpot.selectorLabels" . }}
app.kubernetes.io/part-of: jackpot
{{- with .ctx.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jackpot.controlPlane.name" -}}{{ include "jackpot.fullname" . }}-control-plane{{- end -}}
{{- define "jackpot.redis.name" -}}{{ include "jackpot.fullname" . }}-redis{{- end -}}

{{- define "jackpot.controlPlane.serviceAccount" -}}
{{- .Values.controlPlane.serviceAccount.name | default (ternary (include "jackpot.controlPlane.name" .) "default" .Values.controlPlane.serviceAccount.create) -}}
{{- end -}}

{{- define "jackpot.workers.serviceAccount" -}}
{{- .Values.workers.serviceAccount.name | default (ternary (printf "%s-worker" (include "jackpot.fullname" .)) "default" .Values.workers.serviceAccount.create) -}}
{{- end -}}

{{/* An image. Arguments: registry, repository, tag, digest. */}}
{{- define "jackpot.image" -}}
{{- $path := ternary (printf "%s/%s" .registry .repository) .repository (ne .registry "") -}}
{{- if .digest -}}{{ printf "%s@%s" $path .digest }}{{- else -}}{{ printf "%s:%s" $path .tag }}{{- end -}}
{{- end -}}

{{/* The image of one of our roles. Arguments: ctx, role (as in the image's name), image (its values). */}}
{{- define "jackpot.roleImage" -}}
{{- $common := .ctx.Values.image -}}
{{- $repository := .image.repository | default (printf "%s-%s" $common.repository .role) -}}
{{- $suffix := ternary $common.gpuSuffix "" (has .role (list "rollout" "scorer" "learner")) -}}
{{- $tag := .image.tag | default (printf "%s%s" ($common.tag | default .ctx.Chart.AppVersion) $suffix) -}}
{{- include "jackpot.image" (dict "registry" $common.registry "repository" $repository "tag" $tag "digest" .image.digest) -}}
{{- end -}}

{{- define "jackpot.controlPlane.image" -}}
{{- include "jackpot.roleImage" (dict "ctx" . "role" "control-plane" "image" .Values.controlPlane.image) -}}
{{- end -}}

{{- define "jackpot.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Security of a pod and of a container: the "restricted" Pod Security Standard and a read-only root. */}}
{{- define "jackpot.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}
{{- define "jackpot.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where a pod goes. Argument: the values of its role. */}}
{{- define "jackpot.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Names of the TLS secrets. */}}
{{- define "jackpot.controlPlane.tlsSecret" -}}
{{- .Values.controlPlane.tls.existingSecret | default (printf "%s-tls" (include "jackpot.controlPlane.name" .)) -}}
{{- end -}}
{{- define "jackpot.workers.tlsSecret" -}}
{{- .Values.tls.workers.existingSecret | default (printf "%s-worker-tls" (include "jackpot.fullname" .)) -}}
{{- end -}}
{{- define "jackpot.redis.tlsSecret" -}}
{{- .Values.redis.tls.existingSecret | default (printf "%s-tls" (include "jackpot.redis.name" .)) -}}
{{- end -}}

{{/* The secret whose ca.crt the control plane trusts: where it speaks no TLS itself, it still must trust the bus. */}}
{{- define "jackpot.controlPlane.authoritySecret" -}}
{{- if .Values.controlPlane.tls.enabled -}}{{ include "jackpot.controlPlane.tlsSecret" . }}
{{- else if and .Values.redis.enabled .Values.redis.tls.enabled -}}{{ include "jackpot.redis.tlsSecret" . }}
{{- else -}}{{ include "jackpot.workers.tlsSecret" . }}
{{- end -}}
{{- end -}}

{{- define "jackpot.controlPlane.authSecret" -}}
{{- .Values.controlPlane.auth.existingSecret | default (printf "%s-tokens" (include "jackpot.controlPlane.name" .)) -}}
{{- end -}}

{{/* The secret with the addresses of the bus, a key <role>-url for each role. */}}
{{- define "jackpot.redis.secret" -}}
{{- if .Values.redis.enabled -}}
{{- .Values.redis.auth.existingSecret | default (include "jackpot.redis.name" .) -}}
{{- else -}}
{{- .Values.externalRedis.existingSecret | default (printf "%s-external-redis" (include "jackpot.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{- define "jackpot.runs.claim" -}}
{{- .Values.storage.runs.existingClaim | default (printf "%s-runs" (include "jackpot.fullname" .)) -}}
{{- end -}}
{{- define "jackpot.models.claim" -}}
{{- .Values.storage.models.existingClaim | default (printf "%s-models" (include "jackpot.fullname" .)) -}}
{{- end -}}

{{/* DNS names of the control plane's Service, first the one that the chart's own clients use. */}}
{{- define "jackpot.controlPlane.host" -}}
{{- printf "%s.%s.svc" (include "jackpot.controlPlane.name" .) .Release.Namespace -}}
{{- end -}}
{{- define "jackpot.controlPlane.scheme" -}}{{ ternary "https" "http" .Values.controlPlane.tls.enabled }}{{- end -}}

{{/* Where the object store is, as variables. */}}
{{- define "jackpot.objects.env" -}}
{{- $env := dict }}
{{- with .Values.storage.objects.endpoint }}{{ $_ := set $env "AWS_ENDPOINT_URL" . }}{{ end }}
{{- with .Values.storage.objects.region }}{{ $_ := set $env "AWS_DEFAULT_REGION" . }}{{ end }}
{{- toJson $env }}
{{- end -}}
