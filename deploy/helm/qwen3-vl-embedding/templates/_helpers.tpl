{{/* What every selector has: the name of the project and of the release. */}}
{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/*
Selects the pods that serve. The revision is part of it: a Deployment's selector cannot be changed, so Kubernetes
refuses another revision in the same release, and two models never answer one Service.
*/}}
{{- define "serving" -}}
{{ include "selector" . }}
app.kubernetes.io/component: service
qwen3-vl-embedding/revision: {{ .Values.model.revision | quote }}
{{- end }}

{{/* Whether a model or a reranker is a hub id, so that a job downloads it into a volume. Others are folders. */}}
{{- define "downloads" -}}
{{ range list .Values.model.name .Values.settings.EMBEDDER_RERANKER }}{{ if regexMatch "^[^/.~].*/" (. | default "") }}true{{ end }}{{ end }}
{{- end }}

{{- define "image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "isScaled" -}}
{{ if or (ne .Values.autoscaling.kind "none") (gt (int .Values.replicas) 1) }}true{{ end }}
{{- end }}

{{/* Seconds until each accepted request has ended: EMBEDDER_REQUEST_TIMEOUT_S for its body, again for its items, and 10. */}}
{{- define "longestRequest" -}}
{{ .Values.settings.EMBEDDER_REQUEST_TIMEOUT_S | default "60" | float64 | mulf 2 | addf 10 | ceil | int }}
{{- end }}

{{/* How the autoscaler behaves. Loading a model takes minutes: it waits for the last replica before it adds more. */}}
{{- define "behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 30
  policies:
    - {type: Pods, value: 2, periodSeconds: 180}
scaleDown:
  stabilizationWindowSeconds: 900
  policies:
    - {type: Pods, value: 1, periodSeconds: 300}
{{- end }}

{{- define "podSecurity" -}}
runAsNonRoot: true
runAsUser: 1034 # the user of BentoML's images
runAsGroup: 1034
fsGroup: 1034
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "containerSecurity" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end }}

{{- define "gpuToleration" -}}
- key: nvidia.com/gpu
  operator: Exists
  effect: NoSchedule
{{- end }}
