{{/* Pods of Ray: give (list . "component" ...), one or several. */}}
{{- define "headwater.pods" -}}
matchLabels:
  {{- include "headwater.selector" (index . 0) | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [{{ rest . | join ", " }}]}
{{- end -}}

{{/* Sessions and drafts: any port that the system gives to a server that asks for none. */}}
{{- define "headwater.anyPort" -}}
- {protocol: TCP, port: 32768, endPort: 60999}
{{- end -}}

{{- define "headwater.rayPortList" -}}
- {protocol: TCP, port: 6379, endPort: 6383} # GCS, node and object managers, agents
- {protocol: TCP, port: 8000} # Serve's health
- {protocol: TCP, port: 8265} # the head's dashboard, where autoscaling asks
- {protocol: TCP, port: 10002, endPort: 10999} # workers and drivers of Ray
- {protocol: TCP, port: 52365} # agents
{{- end -}}

{{- define "headwater.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "headwater.fullname" (index . 0) }}-{{ index . 1 }}
  {{- include "headwater.metadata" (list (index . 0) "" (dict) (dict)) | nindent 2 }}
spec:
  podSelector:
    {{- include "headwater.pods" (prepend (slice . 2) (index . 0)) | nindent 4 }}
{{- end -}}
