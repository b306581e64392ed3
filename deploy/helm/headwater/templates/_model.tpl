{{/* Where models come from and where they lie in pods. A model is {source, path} with a role, `target` or `draft`. */}}

{{/* "target", or "target draft" where a drafter needs the small one, as a JSON list of {role, source, path}. */}}
{{- define "headwater.models" -}}
{{- $models := list (dict "role" "target" "source" .Values.model.source "path" .Values.model.path) -}}
{{- if eq (include "headwater.wantsDraft" .) "true" -}}
{{- $models = append $models (merge (dict "role" "draft") (pick .Values.model.draft "source" "path")) -}}
{{- end -}}
{{- toJson (dict "all" $models) -}}
{{- end -}}

{{/* A small model is needed by drafters in the pool that have kind `model` (the default), or by such a one in the worker. */}}
{{- define "headwater.wantsDraft" -}}
{{- $inWorker := dig "worker" "engine" "speculation" "drafters" (list) .Values.config -}}
{{- $inPool := dig "drafter" "drafters" (list "model") .Values.config -}}
{{- if or (has "model" $inWorker) (and (gt (int .Values.drafters.replicas) 0) (has "model" $inPool)) -}}true{{- end -}}
{{- end -}}

{{- define "headwater.isDownload" -}}
{{- if or (hasPrefix "hf://" .) (hasPrefix "s3://" .) -}}true{{- end -}}
{{- end -}}

{{- define "headwater.downloads" -}}
{{- $any := "" -}}
{{- range (include "headwater.models" . | fromJson).all -}}{{- if include "headwater.isDownload" .source -}}{{- $any = "true" -}}{{- end -}}{{- end -}}
{{- $any -}}
{{- end -}}

{{/* The folder of a download below /models: another source is another folder, so an update never mixes two models. */}}
{{- define "headwater.folder" -}}
{{- $words := regexReplaceAll "@.*$" . "" | splitList "/" -}}
{{- printf "%s-%s" (last (without $words "") | lower) (sha256sum . | trunc 10) -}}
{{- end -}}

{{/* Where the program finds a model. Give {role, source, path}. */}}
{{- define "headwater.modelPath" -}}
{{- if eq .source "image" -}}
{{ .path }}
{{- else if hasPrefix "pvc://" .source -}}
{{- $parts := trimPrefix "pvc://" .source | splitList "/" -}}
{{- printf "/volumes/%s/%s" .role (join "/" (rest $parts)) | trimSuffix "/" -}}
{{- else -}}
/models/{{ include "headwater.folder" .source }}
{{- end -}}
{{- end -}}

{{/* What clients ask for: said once here, since the folder's name would hold a hash. */}}
{{- define "headwater.modelName" -}}
{{- if .Values.model.name -}}
{{ .Values.model.name }}
{{- else if include "headwater.isDownload" .Values.model.source -}}
{{- regexReplaceAll "@.*$" .Values.model.source "" | trimSuffix "/" | base -}}
{{- end -}}
{{- end -}}

{{- define "headwater.cacheClaim" -}}
{{- .Values.model.cache.existingClaim | default (printf "%s-models" (include "headwater.fullname" .)) -}}
{{- end -}}

{{/* Volumes of models. */}}
{{- define "headwater.modelVolumes" -}}
{{- range (include "headwater.models" . | fromJson).all }}
{{- if hasPrefix "pvc://" .source }}
- name: model-{{ .role }}
  persistentVolumeClaim: {claimName: {{ trimPrefix "pvc://" .source | splitList "/" | first }}, readOnly: true}
{{- end }}
{{- end }}
{{- if include "headwater.downloads" . }}
- name: models
  {{- if eq .Values.model.cache.kind "pvc" }}
  persistentVolumeClaim: {claimName: {{ include "headwater.cacheClaim" . }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.model.cache.size }}}
  {{- include "headwater.authVolume" . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "headwater.modelMounts" -}}
{{- range (include "headwater.models" . | fromJson).all }}
{{- if hasPrefix "pvc://" .source }}
- {name: model-{{ .role }}, mountPath: /volumes/{{ .role }}, readOnly: true}
{{- end }}
{{- end }}
{{- if include "headwater.downloads" . }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{/* Containers that bring a download to /models, or wait until the Job has. Give (list . "component" wait). */}}
{{- define "headwater.fetchers" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $wait := index . 2 -}}
{{- range ($root | include "headwater.models" | fromJson).all }}
{{- if include "headwater.isDownload" .source }}
{{- $isS3 := and (hasPrefix "s3://" .source) (not $wait) }}
- name: {{ ternary "await" "fetch" $wait }}-{{ .role }}
  image: {{ ternary (printf "%s:%s" $root.Values.model.download.s3Image.repository $root.Values.model.download.s3Image.tag) (include "headwater.image" $root) $isS3 }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  securityContext:
    {{- include "headwater.containerSecurity" $root | nindent 4 }}
  command: [/bin/sh, -euc]
  args:
    - |
      {{- if $wait }}
      until [ -f "$FOLDER/.complete" ]; do echo "waiting for $SOURCE in $FOLDER"; sleep 5; done
      {{- else }}
      if [ -f "$FOLDER/.complete" ]; then exit 0; fi
      mkdir -p "$FOLDER"
      {{- if $root.Values.model.authSecret }}
      for file in /etc/headwater/download/*; do export "${file##*/}=$(cat "$file")"; done
      {{- end }}
      {{- if $isS3 }}
      aws s3 sync --only-show-errors ${AWS_ENDPOINT_URL:+--endpoint-url "$AWS_ENDPOINT_URL"}{{ if eq $component "router" }} --exclude '*.safetensors'{{ end }} "$SOURCE" "$FOLDER"
      {{- else }}
      hf download "$REPOSITORY" ${REVISION:+--revision "$REVISION"} --local-dir "$FOLDER" --exclude '*.bin' --exclude '*.pth' --exclude '*.gguf' --exclude 'original/*'{{ if eq $component "router" }} --exclude '*.safetensors'{{ end }}
      {{- end }}
      touch "$FOLDER/.complete"
      {{- end }}
  env:
    - {name: HOME, value: /var/lib/headwater}
    - {name: SOURCE, value: {{ .source | quote }}}
    - {name: FOLDER, value: {{ include "headwater.modelPath" . | quote }}}
    {{- if and (hasPrefix "hf://" .source) (not $wait) }}
    {{- $words := trimPrefix "hf://" .source | splitList "@" }}
    - {name: REPOSITORY, value: {{ first $words | quote }}}
    {{- if rest $words }}
    - {name: REVISION, value: {{ last $words | quote }}}
    {{- end }}
    - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
    {{- end }}
    {{- with $root.Values.model.download.endpoint }}
    - {name: {{ ternary "AWS_ENDPOINT_URL" "HF_ENDPOINT" $isS3 }}, value: {{ . | quote }}}
    {{- end }}
  resources:
    {{- $memory := ternary "64Mi" $root.Values.model.download.memory $wait }}
    {{- $cpu := ternary "10m" $root.Values.model.download.cpu $wait }}
    requests: {cpu: {{ $cpu }}, memory: {{ $memory }}}
    limits: {cpu: {{ ternary "100m" $cpu $wait }}, memory: {{ $memory }}}
  volumeMounts:
    - {name: models, mountPath: /models{{ if $wait }}, readOnly: true{{ end }}}
    - {name: home, mountPath: /var/lib/headwater}
    - {name: tmp, mountPath: /tmp}
    {{- if and $root.Values.model.authSecret (not $wait) }}
    - {name: download, mountPath: /etc/headwater/download, readOnly: true}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The volume of the credentials of downloads. */}}
{{- define "headwater.authVolume" -}}
{{- with .Values.model.authSecret }}
- name: download
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end -}}
