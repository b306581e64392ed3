{{/* The program's configuration tree: `config`, with what Kubernetes needs on top. */}}

{{- define "headwater.tree" -}}
{{- $v := .Values -}}
{{- $models := (include "headwater.models" . | fromJson).all -}}
{{- $scaled := $v.autoscaling.enabled -}}
{{- $drafts := gt (int $v.drafters.replicas) 0 -}}

{{- $grpc := dict "host" "0.0.0.0" "port" $v.router.grpc.port -}}
{{- with $v.router.tls -}}
{{- if .secretName -}}
{{- $tls := dict "cert_file" "/etc/headwater/router-tls/tls.crt" "key_file" "/etc/headwater/router-tls/tls.key" -}}
{{- if .clientCASecretName -}}{{- $_ := set $tls "client_ca_file" "/etc/headwater/client-ca/ca.crt" -}}{{- end -}}
{{- $_ := set $grpc "tls" $tls -}}
{{- end -}}
{{- end -}}
{{- $router := dict "grpc" $grpc "metrics" (dict "host" "0.0.0.0" "port" $v.router.http.port) -}}
{{- if $v.tenants.existingSecret -}}
{{- $_ := set $router "tenants" (dict "file" (printf "/etc/headwater/tenants/%s" $v.tenants.key)) -}}
{{- end -}}

{{- $model := dict "path" (include "headwater.modelPath" (first $models)) -}}
{{- with include "headwater.modelName" . -}}{{- $_ := set $model "name" . -}}{{- end -}}
{{- $worker := dict "model" $model "session" (dict "host" "") "metrics" (dict "host" "0.0.0.0" "port" $v.workers.metricsPort) -}}
{{- $drafter := dict -}}
{{- if $drafts -}}
{{- $drafter = dict "host" "" "threads" $v.drafters.cpu "metrics" (dict "host" "0.0.0.0" "port" $v.drafters.metricsPort) -}}
{{- end -}}
{{- if gt (len $models) 1 -}}
{{- $draft := include "headwater.modelPath" (last $models) -}}
{{- if $drafts -}}{{- $_ := set $drafter "draft_model" $draft -}}{{- end -}}
{{- if has "model" (dig "worker" "engine" "speculation" "drafters" (list) $v.config) -}}
{{- $_ := set $worker "engine" (dict "speculation" (dict "draft_model" $draft)) -}}
{{- end -}}
{{- end -}}

{{- /* The numbers of replicas stand in the Serve configuration, where a change restarts nothing. */ -}}
{{- $cluster := dict "num_workers" 1 "num_routers" 1 "num_drafters" (ternary 1 0 $drafts)
  "router_cpus" $v.router.cpu "worker_cpus" $v.workers.cpu "worker_gpus" $v.workers.gpu
  "router_labels" (dict "headwater/role" "router") "worker_labels" (dict "headwater/role" "worker") -}}
{{- if $drafts -}}
{{- $_ := mergeOverwrite $cluster (dict "drafter_cpus" $v.drafters.cpu "drafter_gpus" $v.drafters.gpu "drafter_labels" (dict "headwater/role" "drafter")) -}}
{{- end -}}
{{- if $scaled -}}
{{- $scaling := dict "min_workers" (include "headwater.minWorkers" . | int) "max_workers" (include "headwater.maxWorkers" . | int)
  "target_queued_tokens" $v.autoscaling.targetQueuedTokens "target_kv_use" $v.autoscaling.targetKvUse
  "upscale_delay_s" $v.autoscaling.upscaleDelaySeconds "downscale_delay_s" $v.autoscaling.downscaleDelaySeconds -}}
{{- with $v.autoscaling.targetFirstTokenSeconds -}}{{- $_ := set $scaling "target_first_token_s" . -}}{{- end -}}
{{- $_ := set $cluster "autoscaling" $scaling -}}
{{- end -}}
{{- if include "headwater.tokenSecret" . -}}
{{- $_ := set $cluster "session_token_file" "/etc/headwater/session/token" -}}
{{- end -}}
{{- with $v.security.memberTLS -}}
{{- if .secretName -}}
{{- $_ := set $cluster "tls" (dict "cert_file" "/etc/headwater/members/tls.crt" "key_file" "/etc/headwater/members/tls.key" "ca_file" "/etc/headwater/members/ca.crt" "server_name" .serverName) -}}
{{- end -}}
{{- end -}}

{{- $ours := dict "router" $router "worker" $worker "cluster" $cluster -}}
{{- if $drafts -}}{{- $_ := set $ours "drafter" $drafter -}}{{- end -}}
{{- toYaml (mergeOverwrite (deepCopy $v.config) $ours) -}}
{{- end -}}

{{/* The Secret that holds the session token; empty: the program makes its own. */}}
{{- define "headwater.tokenSecret" -}}
{{- with .Values.security.sessionToken -}}
{{- if .existingSecret -}}{{ .existingSecret }}{{- else if .value -}}{{ include "headwater.fullname" $ }}-session{{- end -}}
{{- end -}}
{{- end -}}

{{- define "headwater.drainSeconds" -}}
{{- dig "cluster" "drain_timeout_s" 20 .Values.config | ceil | int -}}
{{- end -}}

{{- define "headwater.serveConfig" -}}
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
applications:
  - name: headwater
    import_path: cluster.app:build_app
    route_prefix: null
    args:
      {{- include "headwater.tree" . | nindent 6 }}
    deployments:
      - {name: Router, num_replicas: {{ .Values.router.replicas }}}
      {{- if not .Values.autoscaling.enabled }}
      - {name: Worker, num_replicas: {{ include "headwater.numWorkers" . }}}
      {{- end }}
      {{- if gt (int .Values.drafters.replicas) 0 }}
      - {name: Drafter, num_replicas: {{ .Values.drafters.replicas }}}
      {{- end }}
{{- end -}}
