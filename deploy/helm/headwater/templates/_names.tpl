{{/* Names and labels. */}}

{{- define "headwater.fullname" -}}
{{- .Values.fullnameOverride | default (printf "%s-headwater" .Release.Name) -}}
{{- end -}}

{{- define "headwater.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "headwater.serviceAccountName" -}}
{{- if .Values.security.serviceAccount.name -}}
{{ .Values.security.serviceAccount.name }}
{{- else -}}
{{ ternary (include "headwater.fullname" .) "default" .Values.security.serviceAccount.create }}
{{- end -}}
{{- end -}}

{{/* What is chosen by: never changes between versions. */}}
{{- define "headwater.selector" -}}
app.kubernetes.io/name: headwater
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "headwater.labels" -}}
{{ include "headwater.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: headwater
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* metadata's rest: labels, and annotations if there are any. Give (list . "component" extraLabels extraAnnotations). */}}
{{- define "headwater.metadata" -}}
{{- $root := index . 0 -}}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- $labels := include "headwater.labels" $root | fromYaml }}
  {{- if index . 1 }}{{ $_ := set $labels "app.kubernetes.io/component" (index . 1) }}{{ end }}
  {{- toYaml (mergeOverwrite $labels (index . 2)) | nindent 2 }}
{{- with merge (dict) (index . 3) $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Labels of a pod: no version, which would replace pods for nothing. Give (list . "component" podLabels). */}}
{{- define "headwater.podLabels" -}}
{{- $root := index . 0 -}}
{{- $labels := include "headwater.selector" $root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/component" (index . 1) -}}
{{- $_ := set $labels "app.kubernetes.io/part-of" "headwater" -}}
{{- toYaml (mergeOverwrite (deepCopy $root.Values.commonLabels) (deepCopy (index . 2)) $labels) -}}
{{- end -}}

{{/* Whether KubeRay is at least this version. Give (list . "1.6"). "true" or empty. */}}
{{- define "headwater.kuberay" -}}
{{- if semverCompare (printf ">=%s-0" (index . 1)) (index . 0).Values.kuberay.version -}}true{{- end -}}
{{- end -}}

{{- define "headwater.numWorkers" -}}
{{- $sum := 0 -}}{{- range .Values.workers.groups -}}{{- $sum = add $sum .replicas -}}{{- end -}}{{- $sum -}}
{{- end -}}

{{- define "headwater.minWorkers" -}}
{{- $sum := 0 -}}{{- range .Values.workers.groups -}}{{- $sum = add $sum (default 0 .min) -}}{{- end -}}{{- $sum -}}
{{- end -}}

{{- define "headwater.maxWorkers" -}}
{{- $sum := 0 -}}{{- range .Values.workers.groups -}}{{- $sum = add $sum (default 0 .max) -}}{{- end -}}{{- $sum -}}
{{- end -}}
