{{/* Pods of Ray. Each holds the head, one router, one worker or one drafter. */}}

{{- define "headwater.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsGroup }}
fsGroup: {{ .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "headwater.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Ray's ports are fixed, so that a NetworkPolicy can name them. */}}
{{- define "headwater.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "10999"
object-store-memory: {{ .Values.ray.objectStoreBytes | int64 | quote }}
{{- end -}}

{{- define "headwater.env" -}}
- {name: HOME, value: /var/lib/headwater}
- {name: USER, value: headwater} # the image need not know the user's number
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"} # engines step back by themselves (worker.engine.niceness)
{{- if not .Values.ray.auth.enabled }}
- {name: RAY_AUTH_MODE, value: disabled} # else each pod would make a token that no other knows
{{- end }}
{{- range $name, $value := .Values.ray.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{- define "headwater.volumes" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $shared := index . 2 -}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
- {name: ray-logs, emptyDir: {}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ $shared | int64 | quote }}}
{{- with $root.Values.ray.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- with include "headwater.tokenSecret" $root }}
- name: session
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: {{ ternary $root.Values.security.sessionToken.key "token" (ne $root.Values.security.sessionToken.existingSecret "") }}, path: token}]
{{- end }}
{{- if ne $component "head" }}
{{- with $root.Values.security.memberTLS.secretName }}
- name: members
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- include "headwater.modelVolumes" $root }}
{{- end }}
{{- if eq $component "router" }}
{{- with $root.Values.router.tls.secretName }}
- name: router-tls
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with $root.Values.router.tls.clientCASecretName }}
- name: client-ca
  secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- with $root.Values.tenants }}
{{- if .existingSecret }}
- name: tenants
  secret: {secretName: {{ .existingSecret }}, defaultMode: 0440, items: [{key: {{ .key }}, path: {{ .key }}}]}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Secrets are mounted as folders, so that replaced files arrive. */}}
{{- define "headwater.mounts" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/headwater}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: shared-mem, mountPath: /dev/shm}
{{- with $root.Values.ray.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- if include "headwater.tokenSecret" $root }}
- {name: session, mountPath: /etc/headwater/session, readOnly: true}
{{- end }}
{{- if ne $component "head" }}
{{- if $root.Values.security.memberTLS.secretName }}
- {name: members, mountPath: /etc/headwater/members, readOnly: true}
{{- end }}
{{- include "headwater.modelMounts" $root }}
{{- end }}
{{- if eq $component "router" }}
{{- if $root.Values.router.tls.secretName }}
- {name: router-tls, mountPath: /etc/headwater/router-tls, readOnly: true}
{{- end }}
{{- if $root.Values.router.tls.clientCASecretName }}
- {name: client-ca, mountPath: /etc/headwater/client-ca, readOnly: true}
{{- end }}
{{- if $root.Values.tenants.existingSecret }}
- {name: tenants, mountPath: /etc/headwater/tenants, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{/* What places a pod. Give (list . "component" section). */}}
{{- define "headwater.placement" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $section := index . 2 -}}
{{- with $section.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $section.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $section.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $section.spread }}
{{- if .enabled }}
topologySpreadConstraints:
  - maxSkew: {{ .maxSkew }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "headwater.selector" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $component }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Ask Ray to move what runs here elsewhere, and wait until it has ended its streams. */}}
{{- define "headwater.preStop" -}}
{{- $root := index . 0 -}}{{- $port := index . 1 -}}
{{- $drain := include "headwater.drainSeconds" $root | int -}}
exec:
  command:
    - /bin/sh
    - -c
    - |
      ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod ends" \
        --deadline-remaining-seconds {{ add $drain 7 }} || exit 0
      python -c '
      import socket, time
      end = time.monotonic() + {{ add $drain 15 }}
      while time.monotonic() < end:
          with socket.socket() as probe:
              probe.settimeout(1)
              if probe.connect_ex(("127.0.0.1", {{ $port }})):
                  break
          time.sleep(0.5)
      '
{{- end -}}

{{- define "headwater.probe" -}}
{{- $timing := index . 0 -}}{{- $check := index . 1 -}}
{{ $check }}
periodSeconds: {{ $timing.periodSeconds }}
timeoutSeconds: {{ $timing.timeoutSeconds }}
failureThreshold: {{ $timing.failureThreshold }}
{{- end -}}

{{/* A pod of the router, a worker or a drafter.
Give {root, component, section, cpu, gpu, memory, shared, port: of metrics, ports: more}. */}}
{{- define "headwater.pod" -}}
{{- $root := .root -}}
{{- $raylet := "httpGet: {path: /api/local_raylet_healthz, port: 52365}" -}}
{{- $ready := printf "httpGet: {path: /metrics, port: %d}" (int .port) -}}
{{- if eq .component "router" -}}
{{- $ready = ternary "tcpSocket: {port: grpc}" (printf "grpc: {port: %d}" (int $root.Values.router.grpc.port)) (ne $root.Values.router.tls.secretName "") -}}
{{- end -}}
metadata:
  labels:
    {{- include "headwater.podLabels" (list $root .component (default (dict) .section.podLabels)) | nindent 4 }}
  {{- with .section.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "headwater.serviceAccountName" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (include "headwater.drainSeconds" $root | int) 30 }}
  securityContext:
    {{- include "headwater.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with include "headwater.placement" (list $root .component .section) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if include "headwater.downloads" $root }}
  initContainers:
    {{- include "headwater.fetchers" (list $root .component (eq $root.Values.model.cache.kind "pvc")) | trim | nindent 4 }}
  {{- end }}
  containers:
    - name: ray
      image: {{ include "headwater.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "headwater.containerSecurity" $root | nindent 8 }}
      env:
        {{- include "headwater.env" $root | nindent 8 }}
      ports:
        {{- with .ports }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        - {name: metrics, containerPort: {{ .port }}}
        - {name: ray-metrics, containerPort: 8080}
      startupProbe:
        {{- include "headwater.probe" (list $root.Values.probes.startup $raylet) | nindent 8 }}
      livenessProbe:
        {{- include "headwater.probe" (list $root.Values.probes.liveness $raylet) | nindent 8 }}
      readinessProbe:
        {{- include "headwater.probe" (list $root.Values.probes.readiness $ready) | nindent 8 }}
      lifecycle:
        preStop:
          {{- include "headwater.preStop" (list $root .port) | nindent 10 }}
      resources:
        {{- $resources := dict "cpu" (toString .cpu) "memory" .memory }}
        {{- if .gpu }}{{ $_ := set $resources $root.Values.workers.gpuResource (toString .gpu) }}{{ end }}
        requests:
          {{- toYaml $resources | nindent 10 }}
        limits:
          {{- toYaml $resources | nindent 10 }}
      volumeMounts:
        {{- include "headwater.mounts" (list $root .component) | nindent 8 }}
  volumes:
    {{- include "headwater.volumes" (list $root .component .shared) | nindent 4 }}
{{- end -}}

{{- define "headwater.headPod" -}}
metadata:
  labels:
    {{- include "headwater.podLabels" (list . "head" .Values.ray.head.podLabels) | nindent 4 }}
  annotations:
    headwater/config: {{ include "headwater.tree" . | sha256sum | trunc 16 }} # another one counts as another cluster
    {{- with .Values.ray.head.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "headwater.serviceAccountName" . }}
  automountServiceAccountToken: {{ .Values.autoscaling.enabled }} # Ray's autoscaler changes this RayCluster
  enableServiceLinks: false
  terminationGracePeriodSeconds: 30
  securityContext:
    {{- include "headwater.podSecurity" . | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with include "headwater.placement" (list . "head" .Values.ray.head) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: ray
      image: {{ include "headwater.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "headwater.containerSecurity" . | nindent 8 }}
      env:
        {{- include "headwater.env" . | nindent 8 }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
      {{- $gcs := "httpGet: {path: /api/gcs_healthz, port: 8265}" }}
      startupProbe:
        {{- include "headwater.probe" (list .Values.probes.startup $gcs) | nindent 8 }}
      livenessProbe:
        {{- include "headwater.probe" (list .Values.probes.liveness $gcs) | nindent 8 }}
      readinessProbe:
        {{- include "headwater.probe" (list .Values.probes.readiness $gcs) | nindent 8 }}
      resources:
        requests: {cpu: {{ .Values.ray.head.cpu | quote }}, memory: {{ .Values.ray.head.memory }}}
        limits: {cpu: {{ .Values.ray.head.cpu | quote }}, memory: {{ .Values.ray.head.memory }}}
      volumeMounts:
        {{- include "headwater.mounts" (list . "head") | nindent 8 }}
  volumes:
    {{- include "headwater.volumes" (list . "head" (mul 2 (int64 .Values.ray.objectStoreBytes))) | nindent 4 }}
{{- end -}}

{{/* A group of Ray's. Give {root, name, role, min, max, replicas, cpu, gpu, pod}. */}}
{{- define "headwater.group" -}}
- groupName: {{ .name }}
  replicas: {{ .replicas }}
  minReplicas: {{ .min }}
  maxReplicas: {{ .max }}
  labels:
    headwater/role: {{ .role }}
  rayStartParams:
    num-cpus: {{ .cpu | quote }}
    num-gpus: {{ .gpu | quote }}
    {{- include "headwater.rayPorts" .root | nindent 4 }}
  template:
    {{- .pod | nindent 4 }}
{{- end -}}
