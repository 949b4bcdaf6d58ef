/* A Vulkan layer that lets SAPIEN 2 make its device on Mesa's CPU driver.
 *
 * SAPIEN asks every device for VK_KHR_external_semaphore_fd, with which it hands pictures to CUDA. Where the device lacks
 * it, this layer takes the name off the request; nothing else is changed. The loader looks for requested extensions before
 * it calls layers, so the manifest beside the library claims this one.
 *
 * Written after "Architecture of the Vulkan Loader Interfaces", sections on the layer interface and call chains.
 */
#include <stdlib.h>
#include <string.h>
#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

#define DROPPED VK_KHR_EXTERNAL_SEMAPHORE_FD_EXTENSION_NAME
#define EXPORT __attribute__((visibility("default")))

/* Functions of the next in the chain. They find the instance or device by the handle they are given, so one set does. */
static PFN_vkGetInstanceProcAddr next_get_instance;
static PFN_vkGetDeviceProcAddr next_get_device;
static PFN_vkCreateDevice next_create_device;
static PFN_vkEnumerateDeviceExtensionProperties next_extensions;

/* The loader passes the next in the chain in a structure that it adds to the request; it must be moved on by one. */
static VkLayerInstanceCreateInfo *find_link(const void *structures, VkStructureType type) {
  VkLayerInstanceCreateInfo *info = (VkLayerInstanceCreateInfo *)structures;
  while (info && !(info->sType == type && info->function == VK_LAYER_LINK_INFO))
    info = (VkLayerInstanceCreateInfo *)info->pNext;
  return info;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo *request,
                                                      const VkAllocationCallbacks *allocator, VkInstance *instance) {
  VkLayerInstanceCreateInfo *link = find_link(request->pNext, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO);
  if (!link) return VK_ERROR_INITIALIZATION_FAILED;
  next_get_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
  link->u.pLayerInfo = link->u.pLayerInfo->pNext;
  VkResult result = ((PFN_vkCreateInstance)next_get_instance(NULL, "vkCreateInstance"))(request, allocator, instance);
  if (result == VK_SUCCESS) {
    next_create_device = (PFN_vkCreateDevice)next_get_instance(*instance, "vkCreateDevice");
    next_extensions = (PFN_vkEnumerateDeviceExtensionProperties)next_get_instance(
        *instance, "vkEnumerateDeviceExtensionProperties");
  }
  return result;
}

static int device_has(VkPhysicalDevice gpu, const char *name) {
  uint32_t count = 0;
  next_extensions(gpu, NULL, &count, NULL);
  VkExtensionProperties *all = malloc((count + 1) * sizeof *all);
  int found = !all || next_extensions(gpu, NULL, &count, all) != VK_SUCCESS; /* unknown: leave the request alone */
  for (uint32_t i = 0; !found && i < count; i++) found = !strcmp(all[i].extensionName, name);
  free(all);
  return found;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice gpu, const VkDeviceCreateInfo *request,
                                                    const VkAllocationCallbacks *allocator, VkDevice *device) {
  /* The structure for devices has the same layout up to its union. */
  VkLayerDeviceCreateInfo *link =
      (VkLayerDeviceCreateInfo *)find_link(request->pNext, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO);
  if (!link) return VK_ERROR_INITIALIZATION_FAILED;
  next_get_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
  link->u.pLayerInfo = link->u.pLayerInfo->pNext;

  VkDeviceCreateInfo changed = *request;
  const char **names = malloc((request->enabledExtensionCount + 1) * sizeof *names);
  if (!names) return VK_ERROR_OUT_OF_HOST_MEMORY;
  int supported = device_has(gpu, DROPPED);
  changed.enabledExtensionCount = 0;
  changed.ppEnabledExtensionNames = names;
  for (uint32_t i = 0; i < request->enabledExtensionCount; i++)
    if (supported || strcmp(request->ppEnabledExtensionNames[i], DROPPED))
      names[changed.enabledExtensionCount++] = request->ppEnabledExtensionNames[i];
  VkResult result = next_create_device(gpu, &changed, allocator, device);
  free(names);
  return result;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL get_device(VkDevice device, const char *name) {
  return strcmp(name, "vkGetDeviceProcAddr") ? next_get_device(device, name) : (PFN_vkVoidFunction)get_device;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL get_instance(VkInstance instance, const char *name) {
  if (!strcmp(name, "vkGetInstanceProcAddr")) return (PFN_vkVoidFunction)get_instance;
  if (!strcmp(name, "vkGetDeviceProcAddr")) return (PFN_vkVoidFunction)get_device;
  if (!strcmp(name, "vkCreateInstance")) return (PFN_vkVoidFunction)create_instance;
  if (!strcmp(name, "vkCreateDevice")) return (PFN_vkVoidFunction)create_device;
  return next_get_instance ? next_get_instance(instance, name) : NULL;
}

EXPORT VKAPI_ATTR VkResult VKAPI_CALL vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface *interface) {
  if (interface->loaderLayerInterfaceVersion < 2) return VK_ERROR_INITIALIZATION_FAILED;
  interface->loaderLayerInterfaceVersion = 2;
  interface->pfnGetInstanceProcAddr = get_instance;
  interface->pfnGetDeviceProcAddr = get_device;
  interface->pfnGetPhysicalDeviceProcAddr = NULL;
  return VK_SUCCESS;
}
