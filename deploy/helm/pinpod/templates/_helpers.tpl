{{/* Names follow the charts people migrate from: <release>-epp, the release cut to 40 characters. */}}
{{- define "pinpod.release" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "pinpod.epp" -}}
{{ include "pinpod.release" . }}-epp
{{- end }}

{{- define "pinpod.pool" -}}
{{ .Values.pool.name | default (include "pinpod.release" .) }}
{{- end }}

{{- define "pinpod.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "pinpod.epp" .) }}
{{- end }}

{{- define "pinpod.configMap" -}}
{{ .Values.existingConfigMap | default (include "pinpod.epp" .) }}
{{- end }}

{{- define "pinpod.selector" -}}
app.kubernetes.io/name: pinpod
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pinpod.labels" -}}
{{ include "pinpod.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: endpoint-picker
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* "true" when replicas elect a leader. */}}
{{- define "pinpod.elects" -}}
{{- if and (gt (int .Values.replicas) 1) .Values.leaderElection.enabled }}true{{ end }}
{{- end }}

{{- define "pinpod.matchLabels" -}}
{{- $pairs := list }}
{{- range $key, $value := .Values.pool.selector }}{{ $pairs = append $pairs (printf "%s=%s" $key $value) }}{{ end }}
{{- join "," $pairs }}
{{- end }}
